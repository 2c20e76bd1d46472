// The site's pages in Chromium: at two widths, light and dark. A page fails if it says an error on the
// console, asks another host for anything, is wider than the window, or if axe-core finds a violation.

import { createRequire } from "node:module";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

const given = JSON.parse(process.argv[2]);
const require = createRequire(pathToFileURL(join(given.packages, "node_modules", "x.js")));
const { chromium } = require("playwright-core");
const { source: axe } = require("axe-core");
const TAGS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"];

async function complaints(page, address) {
  const wrong = [];
  page.removeAllListeners();
  page.on("pageerror", (error) => wrong.push(String(error)));
  page.on("console", (message) => {
    if (message.type() === "error") wrong.push(message.text());
  });
  page.on("request", (request) => {
    const asked = new URL(request.url());
    if (!["data:", "blob:"].includes(asked.protocol) && asked.origin !== given.url) {
      wrong.push(`asked ${request.url()}`);
    }
  });
  await page.goto(address, { waitUntil: "load" });
  await page.waitForFunction(() => document.querySelector(".md-typeset__scrollwrap")
    || !document.querySelector(".md-typeset table:not([class])"));
  await page.evaluate(axe);
  const found = await page.evaluate(async (values) => {
    const { violations } = await window.axe.run({ runOnly: { type: "tag", values } });
    return violations.map(({ id, nodes }) => `${id}: ${nodes.slice(0, 3).map((n) => n.html).join(" | ")}`);
  }, TAGS);
  const { wide, room } = await page.evaluate(() => ({
    wide: document.documentElement.scrollWidth, room: window.innerWidth,
  }));
  if (wide > room) wrong.push(`${wide} px wide in a window of ${room}`);
  return [...wrong, ...found];
}

const args = process.getuid() === 0 ? ["--no-sandbox"] : []; // Chromium refuses root a sandbox
const browser = await chromium.launch({ executablePath: given.chromium, args });
let failed = 0, passed = 0;
try {
  for (const scheme of ["light", "dark"]) {
    for (const viewport of [{ width: 1280, height: 900 }, { width: 390, height: 844 }]) {
      const context = await browser.newContext({ colorScheme: scheme, viewport, reducedMotion: "reduce" });
      const page = await context.newPage();
      for (const name of given.pages) {
        const found = await complaints(page, `${given.url}/${name}`);
        const place = `${name}, ${scheme}, ${viewport.width} px`;
        if (found.length) console.log(`FAILED  ${place}\n    ${found.join("\n    ")}`);
        failed += found.length > 0;
        passed += !found.length;
        if (given.pictures) {
          const file = `${name.replaceAll("/", "-")}-${scheme}-${viewport.width}.png`;
          await page.screenshot({ path: join(given.pictures, file) });
        }
      }
      await context.close();
    }
  }
} finally {
  await browser.close();
}
console.log(`${passed} passed, ${failed} failed`);
process.exitCode = failed || !passed ? 1 : 0;
