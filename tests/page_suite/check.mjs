// What a user does with the page, in Chromium. Each check has a page of its own; every request to
// another host, error of a script and breach of the policy fails the check.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const given = JSON.parse(process.argv[2]);
const require = createRequire(pathToFileURL(join(given.packages, "node_modules", "x.js")));
const { chromium } = require("playwright-core");
const { source: axe } = require("axe-core");
const WIDE = { width: 1280, height: 900 }, NARROW = { width: 390, height: 844 };
const TOKEN = ".tokens .t";

async function open(browser, { scheme = "light", viewport = WIDE, url = given.url } = {}) {
  const context = await browser.newContext({ colorScheme: scheme, viewport, reducedMotion: "reduce" });
  const page = await context.newPage();
  page.wrong = [];
  page.bodies = [];
  page.on("pageerror", (error) => page.wrong.push(String(error)));
  page.on("console", (message) => {
    // A refused request is told on the console too; the page's own line about it is checked.
    const refused = message.text().startsWith("Failed to load resource");
    if (message.type() === "error" && !refused) page.wrong.push(message.text());
  });
  page.on("request", (request) => {
    if (new URL(request.url()).origin !== url) page.wrong.push(`asked ${request.url()}`);
    if (request.method() === "POST") page.bodies.push(request.postDataJSON());
  });
  await page.goto(url);
  if (url === given.url) await page.waitForSelector("#page:not([hidden])");
  return page;
}

async function choose(page, model) {
  if (await page.inputValue("#model") !== model) await page.selectOption("#model", model);
  await page.waitForFunction((puzzle) => document.getElementById("puzzles").hidden !== puzzle,
    model !== "text");
}

const finished = (page) => page.waitForSelector("#send:enabled", { timeout: 60_000 });
const slide = (page, id, loops) => page.locator(id).fill(String(loops));
const loopsOf = (page, lane = 0) => page.locator(".turn:last-child .lane").nth(lane).locator(".t")
  .evaluateAll((tokens) => tokens.map((token) => Number(token.dataset.loops)));

async function send(page, prompt, tokens = 40) {
  await page.fill("#max-tokens", String(tokens));
  await page.fill("#prompt", prompt);
  await page.press("#prompt", "Enter");
}

async function violations(page) {
  await page.evaluate(axe); // not a script of the page: its policy would refuse one
  const tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];
  const found = await page.evaluate((values) => window.axe.run({ runOnly: { type: "tag", values } }),
    tags);
  return found.violations.map(({ id, nodes }) => `${id}: ${nodes.map((n) => n.html).join(" | ")}`);
}

async function running(page) {
  const text = await (await page.request.get(`${given.url}/metrics`)).text();
  const values = [...text.matchAll(/^openmythos_requests_running\{.*\} (\S+)$/gm)];
  assert(values.length > 0, "no metric of what runs");
  return values.reduce((total, [, value]) => total + Number(value), 0);
}

const checks = {
  async "by keyboard alone: prompt, answer, tokens"(browser) {
    const page = await open(browser);
    await choose(page, "text");
    const focused = () => page.evaluate(() => document.activeElement.id);
    await page.locator("#model").focus();
    const passed = [];
    for (let pressed = 0; pressed < 40 && await focused() !== "prompt"; pressed += 1) {
      await page.keyboard.press("Tab");
      passed.push(await focused());
    }
    assert.equal(await focused(), "prompt", `Tab went over ${passed}`);
    for (const id of ["loops-a", "effort-a", "compare", "rule", "temperature", "max-tokens", "seed"]) {
      assert(passed.includes(id), `${id} is not reached by Tab`);
    }
    await page.keyboard.type("hello");
    await page.keyboard.press("Enter");
    await finished(page);
    for (let pressed = 0; pressed < 5; pressed += 1) await page.keyboard.press("Shift+Tab");
    for (let pressed = 0; pressed < 5; pressed += 1) {
      if (await page.evaluate(() => document.activeElement.getAttribute("role")) === "option") break;
      await page.keyboard.press("Tab");
    }
    await page.keyboard.press("ArrowRight");
    await page.keyboard.press("ArrowRight");
    const at = await page.evaluate(() => {
      const token = document.activeElement;
      return { role: token.getAttribute("role"), label: token.getAttribute("aria-label"),
        index: [...token.parentElement.children].indexOf(token) };
    });
    assert.equal(at.role, "option");
    assert.equal(at.index, 2);
    assert.match(at.label, /, [\d, ]+ loops?$/);
    assert.match(await page.textContent("#tip"), /^[\d, ]+ loops? of at most 8, tokens? /);
    assert.equal(await page.locator(".lane svg .here").count(), 1, "the curve does not show the token");
    await page.keyboard.press("Escape");
    assert(!await page.isVisible("#tip"));
    await page.keyboard.press("End");
    assert.equal(await page.evaluate(() => document.activeElement.nextSibling), null);
    return page;
  },

  async "streams: tokens come one by one, shaded and underlined by their loops"(browser) {
    const page = await open(browser);
    await choose(page, "text");
    await page.selectOption("#rule", "latent_difference");
    await page.fill("#rule-threshold", "0.4");
    await page.evaluate(() => {
      window.counts = new Set();
      new MutationObserver(() => window.counts.add(document.querySelectorAll(".tokens .t").length))
        .observe(document.getElementById("thread"), { childList: true, subtree: true });
    });
    await send(page, "once", 120);
    await finished(page);
    const counts = await page.evaluate(() => [...window.counts]);
    assert(counts.length > 20, `the answer came in ${counts.length} steps`);
    const [body] = page.bodies;
    const rule = { kind: "latent_difference", threshold: 0.4, min_loops: 1, check_every: 1 };
    assert.deepEqual(body.exit_rule, rule);
    assert.deepEqual([body.num_loops, body.stream, body.include_loops], [8, true, true]);
    const looks = await page.locator(TOKEN).evaluateAll((tokens) => tokens.map((token) => {
      const style = getComputedStyle(token);
      return [Number(token.dataset.loops), style.backgroundColor, style.borderBottomWidth];
    }));
    const kinds = new Map(looks.map(([loops, ...look]) => [loops, look.join(" ")]));
    assert(kinds.size > 1, "the rule let no token leave early");
    assert.equal(new Set(kinds.values()).size, kinds.size, "two depths look alike");
    for (const [loops, ...look] of looks) assert.equal(look.join(" "), kinds.get(loops));
    await page.locator(TOKEN).nth(4).hover();
    assert.match(await page.textContent("#tip"), /^[\d, ]+ loops? of at most 8, tokens? [\dto ]+$/);
    assert.match(await page.textContent("#live"), /^Answer: .*tokens?, [\d.]+ loops on average/s);
    const facts = await page.textContent(".facts");
    assert.match(facts, /tokens\/s[\d.]+/);
    const curve = await page.getAttribute(".charts figure:nth-child(1) svg", "aria-label");
    assert.match(curve, /^Loops of each of 120 tokens/);
    const bars = await page.getAttribute(".charts figure:nth-child(2) svg", "aria-label");
    const told = [...bars.matchAll(/(\d+) tokens? took/g)].reduce((n, [, count]) => n + +count, 0);
    assert.equal(told, 120);
    const number = page.locator(`${TOKEN} sub`).first();
    assert(!await number.isVisible());
    await page.check("#numbers");
    assert(await number.isVisible());
    const shown = await number.evaluate((sub) => getComputedStyle(sub, "::after").content);
    assert.equal(shown, `"${looks[0][0]}"`);
    return page;
  },

  async "the slider and the effort set the loops"(browser) {
    const page = await open(browser);
    await choose(page, "text");
    await page.selectOption("#rule", "fixed");
    await page.focus("#loops-a");
    await page.keyboard.press("Home");
    await send(page, "a", 6);
    await finished(page);
    assert.deepEqual(new Set(await loopsOf(page)), new Set([1]));
    await page.focus("#loops-a");
    await page.keyboard.press("End");
    assert.equal(await page.textContent("#loops-a-said"), "16 of 16");
    await send(page, "a", 6);
    await finished(page);
    assert.deepEqual(new Set(await loopsOf(page)), new Set([16]));
    await page.selectOption("#effort-a", "low");
    assert.equal(await page.textContent("#loops-a-said"), "4 of 16");
    await send(page, "a", 6);
    await finished(page);
    assert.deepEqual(new Set(await loopsOf(page)), new Set([4]));
    assert.equal(page.bodies.at(-1).reasoning_effort, "low");
    assert.equal(page.bodies.at(-1).num_loops, undefined);
    return page;
  },

  async "two depths side by side, in chat, each with its own history"(browser) {
    const page = await open(browser);
    await choose(page, "text");
    await page.check("input[value=chat]");
    await page.selectOption("#rule", "fixed");
    await send(page, "first", 8);
    await finished(page);
    await page.check("#compare");
    await slide(page, "#loops-a", 7);
    await slide(page, "#loops-b", 3);
    await send(page, "second", 8);
    await finished(page);
    await send(page, "third", 8);
    await finished(page);
    assert.deepEqual(new Set(await loopsOf(page, 0)), new Set([7]));
    assert.deepEqual(new Set(await loopsOf(page, 1)), new Set([3]));
    const boxes = await page.locator(".turn:last-child .lane").evaluateAll((lanes) =>
      lanes.map((lane) => lane.getBoundingClientRect().toJSON()));
    assert(boxes[0].right <= boxes[1].left && boxes[0].top === boxes[1].top, "not side by side");
    const [one, a, b, a3, b3] = page.bodies;
    assert.deepEqual(one.messages, [{ role: "user", content: "first" }]);
    assert.deepEqual(a.messages, b.messages);
    assert.equal(a.seed, b.seed);
    assert.deepEqual(a.messages.map(({ role }) => role), ["user", "assistant", "user"]);
    assert.deepEqual([a3, b3].map(({ num_loops }) => num_loops), [7, 3]);
    const texts = await page.locator(".turn:nth-child(2) .lane").evaluateAll((lanes) =>
      lanes.map((lane) => lane.querySelectorAll(".t").length));
    assert(texts.every((count) => count > 0));
    assert.deepEqual(a3.messages.slice(0, 3), a.messages);
    assert.deepEqual(b3.messages.slice(0, 3), b.messages);
    assert.notEqual(a3.messages[3].content, b3.messages[3].content);
    return page;
  },

  async "stop aborts, by button and by Escape"(browser) {
    const page = await open(browser);
    await choose(page, "text");
    for (const stop of [() => page.click("#stop"), () => page.keyboard.press("Escape")]) {
      await send(page, "long", 3000);
      await page.waitForFunction(() =>
        document.querySelectorAll(".turn:last-child .tokens .t").length > 3);
      await stop();
      await finished(page);
      assert.equal(await page.textContent(".turn:last-child .said"), "stopped");
      assert((await loopsOf(page)).length < 3000);
      const end = Date.now() + 1000;
      while (Date.now() < end && await running(page)) await page.waitForTimeout(50);
      assert.equal(await running(page), 0, "the server goes on");
      const before = (await loopsOf(page)).length;
      await page.waitForTimeout(200);
      assert.equal((await loopsOf(page)).length, before);
    }
    return page;
  },

  async "walks: picked, judged, and one of each length"(browser) {
    const page = await open(browser);
    await choose(page, "walks");
    assert.match(await page.textContent(".empty"), /^A walk names where it starts .* up to 8 hops/);
    await page.selectOption("#size", "5");
    assert.match(await page.inputValue("#prompt"), /^e\d+( r\d+){5}$/);
    const before = await page.inputValue("#prompt");
    await page.click("#another");
    assert.notEqual(await page.inputValue("#prompt"), before);
    await page.press("#prompt", "Enter");
    await finished(page);
    assert.match(await page.textContent(".verdict"), /^[✓✗] (right|wrong): the answer is e\d+, answered after \d+ loops?$/);
    await page.check("#compare");
    await page.click("#ask-all");
    await finished(page);
    const rows = page.locator(".turn:last-child tbody tr");
    assert.equal(await rows.count(), 12);
    assert.equal(await page.locator(".turn:last-child td .t").count(), 24);
    assert.match(await page.textContent("#live"), /^\d+ of 24 right\.$/);
    await page.fill("#prompt", "e1 nonsense");
    await page.press("#prompt", "Enter");
    await finished(page);
    assert.match(await page.textContent(".turn:last-child .error"), /no word of a walk/);
    return page;
  },

  async "sums: an answer of several tokens is judged as a whole"(browser) {
    const page = await open(browser);
    await choose(page, "addition");
    assert.equal(await page.textContent("#prompt-label"), "Sum");
    await page.selectOption("#size", "3");
    assert.match(await page.inputValue("#prompt"), /^\d \d \+ \d \d \+ \d \d =$/);
    await page.press("#prompt", "Enter");
    await finished(page);
    assert.equal((await loopsOf(page)).length, 3);
    assert.match(await page.textContent(".verdict"), /the answer is \d \d \d, answered after \d, \d, \d loops$/);
    await page.click("#ask-all");
    await finished(page);
    const rows = page.locator(".turn:last-child tbody tr");
    assert.equal(await rows.count(), 5);
    assert.equal(await page.locator(".turn:last-child td .t").count(), 15);
    return page;
  },

  async "the reading map of a puzzle: a table of loops and words, by keyboard"(browser) {
    const page = await open(browser);
    await choose(page, "walks");
    await page.selectOption("#size", "4");
    await slide(page, "#loops-a", 3);
    await page.focus("#read");
    await page.keyboard.press("Enter");
    await page.waitForSelector(".map tbody tr:nth-child(3)");
    await finished(page);
    assert.deepEqual(page.bodies, [{ model: "walks", size: 4, num_loops: 3 }]);
    const lost = page.locator(".turn .map").first();
    assert.deepEqual(await lost.locator("thead th").allTextContents(),
      ["start", "relation 1", "relation 2", "relation 3"]);
    assert.deepEqual(await lost.locator("tbody th").allTextContents(), ["loop 1", "loop 2", "loop 3"]);
    const cells = await lost.locator("tbody td").allTextContents();
    assert.equal(cells.length, 12);
    for (const cell of cells) assert.match(cell, /^(–|-?\d*\.\d\d)$/);
    assert.match(await page.textContent("#live"), /^With 3 loops, \d+ % of these are answered right/);
    assert(!await page.isVisible(".turn details .map"));
    await page.click(".turn details summary");
    assert.equal(await page.locator(".turn details .map tbody td").count(), 12);
    // A region that may scroll is reached by Tab.
    assert.equal(await page.locator(".turn .table").first().getAttribute("tabindex"), "0");
    await page.route("**/v1/reading", (route) => route.abort());
    await page.click("#read");
    await finished(page);
    assert.match(await page.textContent(".turn:last-child .error"), /does not answer/);
    return page;
  },

  async "errors of the server are one line, and the page goes on"(browser) {
    const page = await open(browser);
    await choose(page, "text");
    await send(page, "a", 99999);
    await finished(page);
    const said = await page.textContent(".turn:last-child .error");
    assert.match(said, /together they may have 4096$/);
    assert(!said.includes("\n"));
    await page.route("**/v1/completions", (route) => route.abort());
    await send(page, "a", 4);
    await finished(page);
    assert.match(await page.textContent(".turn:last-child .error"), /does not answer/);
    await page.unroute("**/v1/completions");
    await send(page, "a", 4);
    await finished(page);
    assert((await loopsOf(page)).length > 0);
    return page;
  },

  async "a key is asked for only if the server wants one"(browser) {
    const free = await open(browser);
    assert(!await free.isVisible("#key-form"));
    await free.context().close();
    const page = await open(browser, { url: given.guarded });
    await page.waitForSelector("#key-form:not([hidden])");
    assert.deepEqual(await violations(page), []);
    await page.fill("#key", "wrong");
    await page.press("#key", "Enter");
    await page.waitForFunction(() =>
      document.getElementById("key-said").textContent.includes("refuses"));
    await page.fill("#key", given.key);
    await page.press("#key", "Enter");
    await page.waitForSelector("#page:not([hidden])");
    assert(!await page.isVisible("#key-form"));
    await send(page, "a", 4);
    await finished(page);
    assert((await loopsOf(page)).length > 0);
    return page;
  },
};

for (const scheme of ["light", "dark"]) {
  for (const [name, viewport] of [["wide", WIDE], ["narrow", NARROW]]) {
    checks[`no violation that axe-core knows: ${scheme}, ${name}`] = async (browser) => {
      const page = await open(browser, { scheme, viewport });
      assert.deepEqual(await violations(page), []);
      await choose(page, "text");
      if (viewport === NARROW) await page.click("#settings summary");
      await page.check("#compare");
      await page.check("#numbers");
      await send(page, "hello", 30);
      await finished(page);
      assert.deepEqual(await violations(page), []);
      await choose(page, "walks");
      await page.click("#ask-all");
      await finished(page);
      assert.deepEqual(await violations(page), []);
      await page.selectOption("#size", "12");
      await slide(page, "#loops-a", 2);
      await page.click("#read");
      await page.waitForSelector(".map tbody tr:nth-child(2)");
      await finished(page);
      await page.click(".turn details summary");
      assert.deepEqual(await violations(page), []);
      for (const width of [viewport.width, 320]) {
        await page.setViewportSize({ width, height: viewport.height });
        const wide = await page.evaluate(() => document.documentElement.scrollWidth);
        assert(wide <= width, `at ${width} px the page is ${wide} px wide`);
      }
      return page;
    };
  }
}

async function pictures(browser) {
  const save = (page, name) => page.screenshot({ path: join(given.pictures, `page-${name}.png`) });
  for (const [name, look] of [["light", { viewport: WIDE }],
    ["narrow", { scheme: "dark", viewport: NARROW }]]) {
    const page = await open(browser, look);
    await choose(page, "text");
    const settings = page.locator("#settings summary");
    if (name === "narrow") await settings.click();
    else await page.check("#compare");
    await slide(page, "#loops-a", 8);
    if (name === "light") await slide(page, "#loops-b", 2);
    await page.fill("#seed", "4");
    await page.fill("#temperature", "0.4");
    await page.fill("#rule-kl", "0.1");
    await page.fill("#rule-entropy", "5");
    await page.fill("#max-tokens", "60");
    if (name === "narrow") await settings.click();
    await page.fill("#prompt", "The function returns");
    await page.press("#prompt", "Enter");
    await finished(page);
    await page.locator(TOKEN).nth(12).hover();
    await save(page, name);
  }
  const page = await open(browser, { scheme: "dark", viewport: WIDE });
  await choose(page, "walks");
  await page.check("#compare");
  await slide(page, "#loops-b", 3);
  await page.click("#ask-all");
  await finished(page);
  await save(page, "dark");
  const reading = await open(browser, { viewport: { width: 1280, height: 760 } });
  await choose(reading, "walks");
  await reading.selectOption("#size", "8");
  await slide(reading, "#loops-a", 4);
  await reading.click("#read");
  await reading.waitForSelector(".map tbody tr:nth-child(4)");
  await finished(reading);
  await save(reading, "reading");
}

const args = process.getuid() === 0 ? ["--no-sandbox"] : []; // Chromium refuses root a sandbox
const browser = await chromium.launch({ executablePath: given.chromium, args });
let failed = 0, passed = 0;
try {
  if (given.pictures) await pictures(browser);
  for (const [name, check] of Object.entries(given.pictures ? {} : checks)) {
    if (given.only && !name.includes(given.only)) continue;
    try {
      const page = await check(browser);
      assert.deepEqual(page.wrong, []);
      passed += 1;
      console.log(`passed  ${name}`);
    } catch (error) {
      failed += 1;
      console.log(`FAILED  ${name}\n${error.stack}`);
    }
    await Promise.all(browser.contexts().map((context) => context.close()));
  }
} finally {
  await browser.close();
}
if (!given.pictures) console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed || (!passed && !given.pictures) ? 1 : 0;
