// The page: asks the server's own API, and shows what depth each token took. No other host is
// asked, nothing is stored, and text of a model is only ever set as text.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const LOOPS = "", OWN_RULE = "";
const RULES = {
  "": "As the server decides.",
  fixed: "Never early: every token takes all its loops.",
  cumulative_threshold: "When the halting head's exit probabilities sum to the threshold.",
  kl: "When a loop no longer changes the prediction.",
  entropy_kl: "When a loop no longer changes the prediction, and the prediction is sharp.",
  latent_difference: "When a loop no longer changes the state.",
  acceleration: "When the state changes by the same from loop to loop.",
  argmax_stable: "When the most likely token has stayed the same for so many loops.",
};

const state = {
  key: "", models: [], model: null, offer: { exit_rules: [], puzzle: null, puzzles: [] },
  conversation: { histories: [[], []] }, running: null, nth: 0,
};

// --- elements ----------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function draw(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// The heading of an answer; its letter is empty if there is only one.
function named(letter, depth) {
  return letter ? `${letter}: ${depth.words}` : capital(depth.words);
}

const letters = (count) => (count > 1 ? ["A", "B"] : [""]);
const capital = (words) => words[0].toUpperCase() + words.slice(1);
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const sum = (numbers) => numbers.reduce((total, number) => total + number, 0);

// Control characters made visible: generated text must not turn the page's direction, for one.
function printable(text) {
  return text.replace(/[\p{Cc}\p{Cf}\p{Cs}]/gu, (character) => {
    if (character === "\n" || character === "\t") return character;
    const code = character.codePointAt(0);
    return code < 0x20 ? String.fromCodePoint(0x2400 + code) : "\ufffd";
  });
}

function spoken(text) {
  if (text === "") return "nothing";
  if (text === " ") return "space";
  if (text === "\n") return "new line";
  return text.trim() === "" ? "white space" : text.trim();
}

// Shade and underline: position between 1 and the most loops, logarithmic.
function shade(element, loops, most) {
  const strength = most > 1 ? Math.log(Math.max(loops, 1)) / Math.log(most) : 0;
  element.style.setProperty("--strength", Math.min(strength, 1).toFixed(2));
}

function marks(most) {
  const numbers = Array.from({ length: most }, (_, index) => index + 1);
  return numbers.filter((n) => most <= 4 || n === most || (n & (n - 1)) === 0);
}

function showLegend() {
  const most = state.model.max_loops;
  const swatches = marks(most).map((n) => {
    const swatch = make("span", { class: "t" }, String(n));
    shade(swatch, n, most);
    return swatch;
  });
  $("legend").replaceChildren("loops a token took:", ...swatches);
}

// --- the server --------------------------------------------------------------------------------

class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body, signal) {
  const headers = state.key ? { authorization: `Bearer ${state.key}` } : {};
  if (body) headers["content-type"] = "application/json";
  const method = body ? "POST" : "GET";
  let answer;
  try {
    answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "the server does not answer");
  }
  if (answer.ok) return answer;
  let said = `the server answered ${answer.status}`;
  try {
    said = (await answer.json()).error.message ?? said;
  } catch { /* not its own answer: a proxy's, for example */ }
  if (answer.status === 401) showKeyForm();
  throw new ServerError(answer.status, said);
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new ServerError(0, "the answer broke off");
      const parts = (held + value).split("\n\n");
      held = parts.pop();
      for (const part of parts) {
        const lines = part.split("\n").filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trim()).join("\n");
        if (data === "[DONE]") return;
        if (!data) continue;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(0, event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function showKeyForm() {
  $("key-form").hidden = false;
  $("key-said").textContent = state.key
    ? "The server refuses this key." : "This server asks for a key. It is kept until this page is closed.";
  $("key").focus();
}

function showError(error) {
  $("page-error").textContent = error ? error.message : "";
  $("page-error").hidden = !error;
}

// --- settings ----------------------------------------------------------------------------------

class Depth {
  constructor(letter) {
    this.slider = $(`loops-${letter}`);
    this.effort = $(`effort-${letter}`);
    this.said = $(`loops-${letter}-said`);
    this.slider.addEventListener("input", () => {
      this.effort.value = LOOPS;
      this.show();
    });
    this.effort.addEventListener("change", () => {
      if (this.effort.value !== LOOPS) this.slider.value = this.table[this.effort.value];
      this.show();
    });
  }

  offer(model, loops) {
    this.table = model.reasoning_effort;
    this.trained = model.num_loops;
    this.slider.max = model.max_loops;
    this.slider.value = loops;
    const efforts = Object.entries(this.table).map(([effort, most]) =>
      make("option", { value: effort }, `${effort}: ${plural(most, "loop")}`));
    this.effort.replaceChildren(make("option", { value: LOOPS }, "as the slider says"), ...efforts);
    this.show();
  }

  get loops() {
    return Number(this.slider.value);
  }

  get body() {
    const effort = this.effort.value;
    return effort === LOOPS ? { num_loops: this.loops } : { reasoning_effort: effort };
  }

  get words() {
    const effort = this.effort.value === LOOPS ? "" : `effort ${this.effort.value}, `;
    return `${effort}up to ${plural(this.loops, "loop")}`;
  }

  show() {
    this.said.textContent = `${this.loops} of ${this.slider.max}`;
    const trained = this.loops === this.trained ? ", the trained depth" : "";
    this.slider.setAttribute("aria-valuetext", `${plural(this.loops, "loop")}${trained}`);
    showSettings();
  }
}

function showSettings() {
  if (!state.depths) return;
  const [a, b] = state.depths;
  const depth = $("compare").checked ? `${a.loops} and ${b.loops} loops` : plural(a.loops, "loop");
  const rule = $("rule").value;
  const exit = rule === "fixed" ? "no early exit" : rule || "the server's exit rule";
  $("settings-said").textContent = `${depth}, ${exit}`;
}

function showRules(kind) {
  const preset = state.offer.default_rule?.replaceAll("_", " ") ?? "none";
  const own = make("option", { value: OWN_RULE }, `the server's: ${preset}`);
  const rules = state.offer.exit_rules.map((rule) =>
    make("option", { value: rule.kind }, rule.kind.replaceAll("_", " ")));
  $("rule").replaceChildren(own, ...rules);
  $("rule").value = kind;
  showRuleFields();
}

function showRuleFields() {
  const rule = state.offer.exit_rules.find(({ kind }) => kind === $("rule").value);
  const inputs = (rule?.fields ?? []).map(({ name, default: value, integer }) => {
    const bounds = integer ? { min: 1, step: 1 } : { min: 0, step: "any" };
    const input = make("input", { id: `rule-${name}`, type: "number", ...bounds });
    input.value = value ?? (integer ? 1 : 0.5);
    input.dataset.field = name;
    const label = make("label", { for: input.id }, name.replaceAll("_", " "));
    return make("div", { class: "field" }, label, input);
  });
  $("rule-fields").replaceChildren(...inputs);
  $("rule-said").textContent = RULES[$("rule").value] ?? "";
  showSettings();
}

function ruleBody() {
  const kind = $("rule").value;
  if (kind === OWN_RULE) return {};
  const inputs = $("rule-fields").querySelectorAll("input");
  const fields = Array.from(inputs, (input) => [input.dataset.field, numberOf(input)]);
  return { exit_rule: { kind, ...Object.fromEntries(fields.filter(([, n]) => n !== null)) } };
}

const numberOf = (input) => (input.value.trim() === "" ? null : Number(input.value));

function sampling() {
  const seed = numberOf($("seed")) ?? Math.floor(Math.random() * 2 ** 31);
  const body = { temperature: numberOf($("temperature")) ?? undefined, seed };
  const most = numberOf($("max-tokens"));
  if (most !== null) body.max_tokens = most;
  return body;
}

const isChat = () => document.querySelector("input[name=mode]:checked")?.value === "chat";

// --- models ------------------------------------------------------------------------------------

async function loadModels() {
  showError(null);
  try {
    state.models = (await (await ask("v1/models")).json()).data;
    $("key-form").hidden = true;
    const options = state.models.map(({ id }) => make("option", { value: id }, id));
    $("model").replaceChildren(...options);
    $("model").disabled = false;
    await chooseModel();
    $("page").hidden = false;
  } catch (error) {
    showError(error.status === 401 ? null : error);
  }
}

async function chooseModel() {
  const name = $("model").value;
  const answer = await ask(`v1/page?${new URLSearchParams({ model: name })}`);
  const offer = await answer.json();
  if (name !== $("model").value) return; // another one was chosen meanwhile
  const model = state.models.find(({ id }) => id === name);
  Object.assign(state, { model, offer, nth: 0 });
  const template = model.chat_template ? "has a chat template" : "base model, no chat template";
  const { puzzle } = offer;
  $("model-facts").textContent =
    `trained at ${plural(model.num_loops, "loop")}, ${model.max_model_len} tokens, `
    + (puzzle ? `knows a puzzle: ${puzzle.kind}` : template);
  state.depths = state.depths ?? [new Depth("a"), new Depth("b")];
  state.depths[0].offer(model, model.num_loops);
  state.depths[1].offer(model, Math.max(1, Math.floor(model.num_loops / 4)));
  showRules(offer.default_rule ? OWN_RULE : "entropy_kl");
  $("temperature").value = puzzle ? 0 : 0.8;
  $("max-tokens").value = puzzle
    ? answerLength(offer.puzzles) : Math.min(200, Math.floor(model.max_model_len / 2));
  $("modes").hidden = Boolean(puzzle);
  $("puzzles").hidden = !puzzle;
  const mode = model.chat_template && !puzzle ? "chat" : "continue";
  document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
  showSizes();
  showLegend();
  startAgain();
}

const sizes = () => [...new Set(state.offer.puzzles.map(({ size }) => size))];
const ofSize = (wanted) => state.offer.puzzles.filter(({ size }) => size === wanted);
const answerLength = (puzzles) =>
  Math.max(1, ...puzzles.map(({ answer }) => answer.split(" ").length));

// "1 hop", "3 hops": the name of a size is that of many.
function sized(size) {
  const word = state.offer.puzzle.size_word;
  return plural(size, word.replace(/s$/, ""));
}

function showSizes() {
  $("size").replaceChildren(...sizes().map((size) => {
    const unseen = ofSize(size)[0].trained ? "" : " (not trained)";
    return make("option", { value: size }, `${sized(size)}${unseen}`);
  }));
  if (sizes().length) $("size").value = sizes()[Math.min(2, sizes().length - 1)];
}

function pickPuzzle() {
  const puzzles = ofSize(Number($("size").value));
  if (puzzles.length) $("prompt").value = puzzles[state.nth++ % puzzles.length].prompt;
}

function startAgain() {
  state.running?.abort();
  state.conversation = { histories: [[], []] };
  const { puzzle } = state.offer;
  $("prompt-label").textContent = puzzle ? capital(puzzle.noun)
    : isChat() ? "Message" : "Text to continue";
  $("clear").textContent = isChat() ? "New conversation" : "Clear";
  const said = puzzle
    ? `${puzzle.explained} The model was trained on up to ${sized(puzzle.max_train_size)}. Pick one, `
      + `ask one of each number of ${puzzle.size_word}, or see in its reading map which loop reads which word.`
    : isChat() ? "Write a message. Each token of the answer is shaded by the loops that it took."
      : "Write the beginning of a text. Each token that follows is shaded by the loops it took.";
  $("thread").replaceChildren(make("p", { class: "empty" }, said));
  $("prompt").value = "";
  $("prompt").rows = puzzle ? 1 : 2;
  if (puzzle) pickPuzzle();
}

// --- an answer ---------------------------------------------------------------------------------

class Lane {
  constructor(letter, depth, most) {
    this.pieces = []; // {text, loops: [one per token], first: index of the first, span}
    this.loops = []; // of every token
    this.budget = depth.loops;
    this.most = most; // of the charts: the larger of two budgets
    this.at = -1;
    this.tokens = make("div", {
      class: "tokens", role: "listbox", "aria-orientation": "horizontal",
      "aria-label": `Tokens of the answer ${letter} and their loops`,
    });
    this.error = make("p", { class: "error", role: "alert", hidden: "" });
    this.said = make("p", { class: "said quiet" }, "waiting …");
    this.facts = make("dl", { class: "facts", hidden: "" });
    this.curve = draw("svg", { role: "img" });
    this.histogram = draw("svg", { role: "img" });
    const caption = (text) => make("figcaption", {}, text);
    this.charts = make("div", { class: "charts", hidden: "" },
      make("figure", {}, caption("Loops of each token, in order; dashed: the most allowed"),
        this.curve),
      make("figure", {}, caption("Tokens by loops"), this.histogram));
    this.element = make("section", { class: "lane", "aria-label": `Answer ${letter}`.trim() },
      make("h3", {}, named(letter, depth)), this.tokens, this.said, this.error, this.facts, this.charts);
    this.listen();
  }

  get text() {
    return this.pieces.map(({ text }) => text).join("");
  }

  listen() {
    const indexOf = ({ target }) => {
      const token = target.closest(".t");
      return this.pieces.findIndex(({ span }) => span === token);
    };
    this.tokens.addEventListener("focusin", (event) => this.point(indexOf(event)));
    this.tokens.addEventListener("focusout", hideTip);
    this.tokens.addEventListener("pointerover", (event) => this.point(indexOf(event)));
    this.tokens.addEventListener("pointerleave", hideTip);
    this.tokens.addEventListener("keydown", (event) => {
      const last = this.pieces.length - 1;
      const to = {
        ArrowRight: this.at + 1, ArrowDown: this.at + 1, ArrowLeft: this.at - 1,
        ArrowUp: this.at - 1, Home: 0, End: last,
      }[event.key];
      if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      this.pieces[Math.min(Math.max(to, 0), last)].span.focus();
    });
    this.curve.addEventListener("pointermove", (event) => {
      const box = this.curve.getBoundingClientRect();
      const place = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
      const token = Math.min(Math.max(Math.floor(place * this.loops.length), 0),
        this.loops.length - 1);
      this.point(this.pieces.findLastIndex(({ first }) => first <= token));
    });
    this.curve.addEventListener("pointerleave", hideTip);
  }

  // Text without tokens belongs to the token before; tokens without text stand for themselves.
  add(text, loops) {
    if (!this.begun) this.begun = performance.now();
    this.last = performance.now();
    const before = this.pieces.at(-1);
    if (loops.length === 0) {
      if (!text || !before) return;
      before.text += text;
      this.label(before);
    } else {
      const span = make("span", { class: "t", role: "option", tabindex: before ? "-1" : "0" });
      const piece = { text, loops, first: this.loops.length, span };
      this.pieces.push(piece);
      this.loops.push(...loops);
      shade(span, Math.max(...loops), state.model.max_loops);
      span.dataset.loops = Math.max(...loops);
      this.label(piece);
      const box = this.tokens;
      const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 4;
      box.append(span);
      if (atEnd && this.at < 0) box.scrollTop = box.scrollHeight; // not away from who reads
    }
    this.redraw();
  }

  label(piece) {
    // The number stands in the token's first line; marks show the ends of lines.
    const number = make("sub", { "data-loops": Math.max(...piece.loops) });
    const [first, ...lines] = printable(piece.text).split("\n");
    const mark = () => make("span", { class: "mark", "aria-hidden": "true" }, "↵");
    const rest = lines.flatMap((line) => [mark(), `\n${line}`]);
    piece.span.replaceChildren(first, number, ...rest);
    piece.span.setAttribute("aria-label", `${spoken(printable(piece.text))}, ${this.words(piece)}`);
  }

  words({ loops }) {
    return loops.length === 1 ? plural(loops[0], "loop") : `${loops.join(", ")} loops`;
  }

  point(index) {
    if (index < 0) return;
    const piece = this.pieces[index];
    this.pieces[this.at]?.span.classList.remove("at");
    this.pieces[this.at]?.span.setAttribute("tabindex", "-1");
    this.pieces[0].span.setAttribute("tabindex", "-1");
    this.at = index;
    piece.span.classList.add("at");
    piece.span.setAttribute("tabindex", "0");
    const [first, last] = [piece.first + 1, piece.first + piece.loops.length];
    const which = first === last ? `token ${first}` : `tokens ${first} to ${last}`;
    showTip(piece.span, `${this.words(piece)} of at most ${this.budget}, ${which}`);
    this.drawCurve();
  }

  redraw() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = undefined;
      this.show();
    });
  }

  show() {
    const count = this.loops.length;
    if (count === 0) return;
    const seconds = (this.last - this.begun) / 1000;
    const rate = count > 1 && seconds > 0 ? ((count - 1) / seconds).toFixed(1) : "–";
    const mean = sum(this.loops) / count;
    const facts = {
      "tokens": count,
      "tokens/s": rate,
      "mean loops": mean.toFixed(2),
      "all loops": sum(this.loops),
      "first token": `${Math.round(this.begun - this.started)} ms`,
    };
    if (this.usage) {
      const cached = this.usage.prompt_tokens_details?.cached_tokens ?? 0;
      facts["prompt tokens"] = this.usage.prompt_tokens + (cached ? ` (${cached} reused)` : "");
    }
    this.facts.replaceChildren(...Object.entries(facts).map(([name, value]) =>
      make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
    this.facts.hidden = count < 2;
    this.charts.hidden = count < 2;
    if (this.charts.hidden) return;
    this.drawCurve();
    drawHistogram(this.histogram, this.loops, this.most);
  }

  drawCurve() {
    if (!this.charts.hidden) {
      const piece = this.pieces[this.at];
      drawCurve(this.curve, this.loops, this.most, this.budget, piece);
    }
  }

  finish(how) {
    this.tokens.removeAttribute("aria-busy");
    if (this.at < 0) this.tokens.scrollTop = 0;
    this.said.textContent = how;
    this.show();
  }

  fail(error) {
    this.error.textContent = error.message;
    this.error.hidden = false;
    this.finish("");
  }
}

function showTip(span, words) {
  const tip = $("tip");
  tip.textContent = words;
  tip.hidden = false;
  const box = span.getClientRects()[0] ?? span.getBoundingClientRect();
  const most = document.documentElement.clientWidth - tip.offsetWidth - 8;
  const top = box.top - tip.offsetHeight - 6;
  tip.style.left = `${Math.max(8, Math.min(box.left, most)) + window.scrollX}px`;
  tip.style.top = `${(top < 0 ? box.bottom + 6 : top) + window.scrollY}px`;
}

function hideTip() {
  $("tip").hidden = true;
}

// --- charts ------------------------------------------------------------------------------------

const LEFT = 26, RIGHT = 6, TOP = 14, HEIGHT = 130, FOOT = 20;

function frame(svg, most) {
  const width = Math.max(svg.parentElement.clientWidth, 160);
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  const bottom = HEIGHT - FOOT;
  return { width, bottom, right: width - RIGHT, y: (n) => bottom - (n / most) * (bottom - TOP) };
}

function text(x, y, words, anchor = "start") {
  return draw("text", { x, y, "text-anchor": anchor }, String(words));
}

function ticks(most) {
  return most <= 4 ? marks(most) : [...new Set([1, Math.round(most / 2), most])];
}

function drawCurve(svg, loops, most, budget, piece) {
  const { right, bottom, y } = frame(svg, most);
  const step = (right - LEFT) / loops.length;
  const gap = step > 4 ? 1 : 0;
  const bars = loops.map((n, index) => {
    const x = (LEFT + index * step).toFixed(1);
    return `M${x} ${bottom}V${y(n).toFixed(1)}h${(step - gap).toFixed(2)}V${bottom}`;
  });
  const parts = ticks(most).flatMap((n) => [
    draw("line", { class: "rule", x1: LEFT, x2: right, y1: y(n), y2: y(n) }),
    text(LEFT - 6, y(n) + 4, n, "end"),
  ]);
  parts.push(draw("path", { class: "bars", d: bars.join("") }),
    draw("line", { class: "limit", x1: LEFT, x2: right, y1: y(budget), y2: y(budget) }),
    text(LEFT, HEIGHT - 4, "token 1"), text(right, HEIGHT - 4, loops.length, "end"));
  if (piece) {
    const x = LEFT + (piece.first + piece.loops.length / 2) * step;
    const top = y(Math.max(...piece.loops));
    parts.push(draw("line", { class: "here", x1: x, x2: x, y1: TOP - 8, y2: bottom }),
      draw("circle", { class: "dot", cx: x, cy: top, r: 4 }));
  }
  svg.setAttribute("aria-label", `Loops of each of ${plural(loops.length, "token")}, in order: `
    + `${Math.min(...loops)} to ${Math.max(...loops)}, `
    + `${(sum(loops) / loops.length).toFixed(1)} on average, at most ${budget} allowed`);
  svg.replaceChildren(...parts);
}

function drawHistogram(svg, loops, most) {
  const counts = Array(most).fill(0);
  for (const n of loops) counts[n - 1] += 1;
  const largest = Math.max(...counts);
  const { right, bottom, y } = frame(svg, largest);
  const step = (right - LEFT) / most;
  const gap = Math.min(3, step * 0.2);
  const parts = [draw("line", { class: "rule", x1: LEFT, x2: right, y1: bottom, y2: bottom })];
  const bars = [];
  const every = Math.ceil(18 / step);
  counts.forEach((count, index) => {
    const x = LEFT + index * step, middle = x + step / 2;
    if (count) {
      bars.push(`M${(x + gap / 2).toFixed(1)} ${bottom}V${y(count).toFixed(1)}`
        + `h${(step - gap).toFixed(1)}V${bottom}`);
    }
    if (count && step >= 14) parts.push(text(middle, y(count) - 3, count, "middle"));
    if (index % every === 0) parts.push(text(middle, HEIGHT - 4, index + 1, "middle"));
  });
  parts.push(draw("path", { class: "bars", d: bars.join("") }));
  const words = counts.map((n, index) => [n, index + 1]).filter(([n]) => n)
    .map(([n, taken]) => `${plural(n, "token")} took ${taken}`);
  svg.setAttribute("aria-label", `Tokens by loops: ${words.join(", ")}`);
  svg.replaceChildren(...parts);
}

// Loops of the answers, their mean if one has several tokens, by size.
function drawSizes(svg, rows, most) {
  const { right, bottom, y } = frame(svg, most);
  const step = (right - LEFT) / rows.length;
  const parts = ticks(most).flatMap((n) => [
    draw("line", { class: "rule", x1: LEFT, x2: right, y1: y(n), y2: y(n) }),
    text(LEFT - 6, y(n) + 4, n, "end"),
  ]);
  rows.forEach(({ puzzle }, index) =>
    parts.push(text(LEFT + (index + 0.5) * step, HEIGHT - 4, puzzle.size, "middle")));
  for (const [lane, letter] of [[1, "b"], [0, "a"]]) {
    const points = rows.map((row, index) => [LEFT + (index + 0.5) * step, row.loops[lane]])
      .filter(([, loops]) => loops).map(([x, loops]) => [x, y(loops)]);
    if (!points.length) continue;
    parts.push(draw("polyline", { class: `line-${letter}`, points: points.join(" ") }));
    parts.push(...points.map(([cx, cy]) =>
      draw("circle", { class: `dot-${letter}`, cx, cy, r: 3.5 })));
  }
  svg.replaceChildren(...parts);
}

// --- asking ------------------------------------------------------------------------------------

function turn(title, said, depths) {
  $("thread").querySelector(".empty")?.remove();
  const most = Math.max(...depths.map((depth) => depth.loops));
  const lanes = depths.map((depth, index) => new Lane(letters(depths.length)[index], depth, most));
  const grid = make("div", { class: `lanes ${lanes.length > 1 ? "two" : ""}` });
  grid.append(...lanes.map((lane) => lane.element));
  const element = make("article", { class: "turn" },
    make("h2", { "data-said": said }, printable(title)), grid);
  $("thread").append(element);
  return { element, lanes };
}

const depthsAsked = () => state.depths.slice(0, $("compare").checked ? 2 : 1);

async function stream(lane, path, body, signal) {
  lane.started = performance.now();
  lane.tokens.setAttribute("aria-busy", "true");
  const answer = await ask(path, {
    ...body, stream: true, include_loops: true, stream_options: { include_usage: true },
  }, signal);
  lane.said.textContent = "answering …";
  let reason = null;
  for await (const event of events(answer)) {
    if (event.usage) lane.usage = event.usage;
    for (const choice of event.choices) {
      lane.add(choice.text ?? choice.delta?.content ?? "", choice.loops ?? []);
      reason = choice.finish_reason ?? reason;
    }
  }
  const how = reason === "length" ? "reached its limit of tokens" : "ended by itself";
  const warning = answer.headers.get("x-warning");
  return [how, ...(warning ? [warning] : [])].join("; ");
}

async function follow(lane, ...asked) {
  const signal = asked.at(-1);
  try {
    lane.finish(await stream(lane, ...asked));
  } catch (error) {
    if (signal.aborted) lane.finish("stopped");
    else lane.fail(error);
  }
}

const BEGINNERS = ["send", "ask-all", "read"];

async function run(work) {
  const control = state.running = new AbortController();
  for (const id of BEGINNERS) $(id).disabled = true;
  $("stop").disabled = false;
  try {
    await work(control.signal);
  } catch (error) {
    if (!control.signal.aborted) throw error;
  } finally {
    if (state.running === control) {
      const stopFocused = document.activeElement === $("stop");
      state.running = null;
      $("stop").disabled = true;
      for (const id of BEGINNERS) $(id).disabled = false;
      if (stopFocused) $("prompt").focus();
    }
  }
}

async function send() {
  const prompt = $("prompt").value;
  if (!prompt.trim() || state.running) return;
  const chat = isChat();
  const puzzle = state.offer.puzzles.find((known) => known.prompt === prompt.trim());
  const shared = { model: state.model.id, ...ruleBody(), ...sampling() };
  const depths = depthsAsked();
  const { element, lanes } = turn(prompt,
    chat ? "You" : state.offer.puzzle ? capital(state.offer.puzzle.noun) : "Text", depths);
  if (!chat) element.classList.add("continue");
  if (chat) $("prompt").value = "";
  reveal(element);
  announce(`Answering with ${lanes.map((lane) => plural(lane.budget, "loop")).join(" and ")}.`);
  // A second depth that joins later goes on from the first one's conversation.
  const { conversation } = state;
  const before = lanes.map((_, index) => conversation.histories[index].length
    ? conversation.histories[index] : conversation.histories[0]);
  conversation.histories = [before[0], before[1] ?? []];
  await run((signal) => Promise.all(lanes.map(async (lane, index) => {
    const body = { ...shared, ...depths[index].body };
    if (!chat) {
      await follow(lane, "v1/completions", { ...body, prompt }, signal);
      if (puzzle && lane.text) judge(lane, puzzle);
      return;
    }
    const messages = [...before[index], { role: "user", content: prompt }];
    await follow(lane, "v1/chat/completions", { ...body, messages }, signal);
    const answer = { role: "assistant", content: lane.text };
    if (lane.text) conversation.histories[index] = [...messages, answer];
  })));
  announce(lanes.map((lane, index) => summary(lane, letters(lanes.length)[index])).join(" "));
  reveal(element);
}

function isRight(said, { answer }) {
  return said.trim().split(/\s+/).slice(0, answer.split(" ").length).join(" ") === answer;
}

function judge(lane, puzzle) {
  const right = isRight(lane.text, puzzle);
  const words = `${right ? "✓ right" : "✗ wrong"}: the answer is ${puzzle.answer}`;
  const counts = lane.loops.length > 1 ? `${lane.loops.join(", ")} loops` : plural(lane.loops[0], "loop");
  const taken = `, answered after ${counts}`;
  lane.said.textContent = ""; // of course it ended after so many tokens
  lane.said.before(make("p", { class: `verdict ${right ? "right" : "wrong"}` }, words + taken));
}

function summary(lane, letter) {
  if (!lane.error.hidden) return "";
  const count = lane.loops.length;
  const mean = count ? (sum(lane.loops) / count).toFixed(1) : 0;
  return `${`Answer ${letter}`.trim()}: ${printable(lane.text)}. ${plural(count, "token")}, ${mean} loops on `
    + `average; ${lane.said.textContent}.`;
}

// One puzzle of each size, at every depth that is asked for: a table and a chart.
async function askAll() {
  if (state.running) return;
  const depths = depthsAsked();
  const most = Math.max(...depths.map((depth) => depth.loops));
  const { noun, size_word: word } = state.offer.puzzle;
  const shared = { model: state.model.id, ...ruleBody(), ...sampling() };
  const nth = state.nth++;
  const rows = sizes().map((size) => {
    const puzzles = ofSize(size);
    const puzzle = puzzles[nth % puzzles.length];
    return { puzzle, loops: [], cells: depths.map(() => make("td", {}, "…")) };
  });
  const names = depths.map((depth, index) => named(letters(depths.length)[index], depth));
  const head = [word, noun, "answer", ...names];
  const body = rows.map(({ puzzle, cells }) => make("tr", {},
    make("td", {}, `${puzzle.size}${puzzle.trained ? "" : " *"}`), make("td", {}, puzzle.prompt),
    make("td", { class: "nowrap" }, puzzle.answer), ...cells));
  const chart = draw("svg", { role: "img", "aria-label": `Loops by ${word}; the table has the numbers` });
  const note = rows.some(({ puzzle }) => !puzzle.trained)
    ? [make("p", { class: "quiet" }, "* larger than any in training")] : [];
  const line = depths.length > 1 ? "; solid: A, dashed: B" : "";
  const element = article(`One of each number of ${word}`,
    make("figure", {}, make("figcaption", {}, `Loops of the answer by ${word}${line}`), chart),
    make("div", { class: "table" }, table(head, body)), ...note);
  announce(`Asking ${plural(rows.length, noun)}.`);
  const answer = async (row, index, signal) => {
    const depth = depths[index];
    try {
      const { prompt, answer: right } = row.puzzle;
      const asked = { ...shared, ...depth.body, prompt, include_loops: true,
        max_tokens: right.split(" ").length };
      const [choice] = (await (await ask("v1/completions", asked, signal)).json()).choices;
      row.loops[index] = sum(choice.loops) / choice.loops.length;
      const badges = choice.loops.map((loops) => {
        const badge = make("span", { class: "t" },
          choice.loops.length > 1 ? String(loops) : plural(loops, "loop"));
        shade(badge, loops, state.model.max_loops);
        return badge;
      });
      const correct = isRight(choice.text, row.puzzle);
      const verdict = make("span", { class: correct ? "right" : "wrong" },
        ` ${correct ? "✓ right" : `✗ ${choice.text.trim()}`}`);
      row.right = [...(row.right ?? []), correct];
      row.cells[index].replaceChildren(...badges, verdict);
    } catch (failure) {
      row.cells[index].textContent = "–";
      if (signal.aborted) return;
      element.fail(failure);
    }
    drawSizes(chart, rows, most);
  };
  await run((signal) => Promise.all(
    rows.flatMap((row) => depths.map((_, index) => answer(row, index, signal)))));
  const marks = rows.flatMap((row) => row.right ?? []);
  announce(`${sum(marks.map(Number))} of ${marks.length} right.`);
  reveal(element);
}

// A turn of the thread that is no answer; `fail` shows an error in it.
function article(title, ...parts) {
  const error = make("p", { class: "error", role: "alert", hidden: "" });
  const element = make("article", { class: "turn" },
    make("h2", { "data-said": capital(state.offer.puzzle.noun) }, title), ...parts, error);
  element.fail = ({ message }) => {
    error.textContent = message;
    error.hidden = false;
  };
  $("thread").querySelector(".empty")?.remove();
  $("thread").append(element);
  reveal(element);
  return element;
}

function table(head, rows) {
  return make("table", {},
    make("thead", {}, make("tr", {}, ...head.map((name) => make("th", { scope: "col" }, name)))),
    make("tbody", {}, ...rows));
}

// --- the reading map ---------------------------------------------------------------------------

const ROW_MS = 350; // between two rows, for who wants movement

// Shares as in print: ".98", "1.00", "-.03"; a column that the answer does not hang on has none.
const share = (value) => (value === null ? "–"
  : value.toFixed(2).replace(/^(-?)0\./, "$1.").replace("-.00", ".00"));

function mapRow(values, index) {
  const cells = values.map((value) => {
    const cell = make("td", {}, share(value));
    cell.style.setProperty("--strength", Math.min(Math.max(value ?? 0, 0), 1).toFixed(2));
    return cell;
  });
  return make("tr", {}, make("th", { scope: "row" }, `loop ${index + 1}`), ...cells);
}

function mapTable(name, columns, values) {
  const head = ["", ...columns].map((column) =>
    make(column ? "th" : "td", column ? { scope: "col" } : {}, make("span", {}, column)));
  const body = make("tbody");
  const grid = make("table", { class: "map" }, make("caption", { class: "unseen" }, name),
    make("thead", {}, make("tr", {}, ...head)), body);
  const box = make("div", { class: "table", role: "region", tabindex: "0", "aria-label": name }, grid);
  return { box, grow: async (signal) => {
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    for (const [index, row] of values.entries()) {
      if (!still && index) await new Promise((done) => setTimeout(done, ROW_MS));
      if (signal.aborted) return;
      body.append(mapRow(row, index));
    }
  } };
}

function mapWords({ accuracy, difference, num_loops: loops }) {
  const percent = Math.round(100 * accuracy);
  const right = `With ${plural(loops, "loop")}, ${percent} % of these are answered right.`;
  const bits = difference.mean_bits;
  const apart = bits === null ? "No two neighbouring loops read anything, so they are not compared."
    : `Neighbouring loops differ by ${share(bits)} bits in what they read: 0 if they read the same `
      + "words, 1 if they have none in common.";
  return `${right} ${apart} Loops that are left over repair what one has misread: the map is `
    + "clearest at the fewest loops that still answer right.";
}

async function readMap() {
  if (state.running) return;
  const size = Number($("size").value), [depth] = state.depths;
  const { noun } = state.offer.puzzle;
  const waiting = make("p", { class: "quiet" }, "computing the map …");
  const element = article(`Which loop reads what: ${sized(size)}, ${plural(depth.loops, "loop")}`,
    waiting);
  announce("Computing the reading map.");
  await run(async (signal) => {
    try {
      const body = { model: state.model.id, size, num_loops: depth.loops };
      const map = await (await ask("v1/reading", body, signal)).json();
      const lost = mapTable("Share of the answer that is lost when a word is wrong during one loop only",
        map.columns, map.necessity);
      const kept = mapTable("Share of the answer that is kept when a word is right during one loop only",
        map.columns, map.sufficiency);
      const words = mapWords(map);
      waiting.replaceWith(
        make("p", { class: "quiet lead" }, `A word of the ${noun} is replaced by another one during one `
          + "loop only. Each number is the share of the answer that is lost by that, the average over "
          + `${Math.max(...map.num_examples)} examples; – where the answer does not hang on the word.`),
        lost.box, make("p", { class: "lead" }, words),
        make("details", {}, make("summary", {}, "The other way round: right during one loop only"),
          kept.box));
      await Promise.all([lost.grow(signal), kept.grow(signal)]);
      announce(words);
    } catch (failure) {
      waiting.remove();
      if (signal.aborted) element.fail({ message: "stopped" });
      else element.fail(failure);
    }
  });
  reveal(element);
}

function announce(words) {
  $("live").textContent = words;
}

function reveal(element) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const sticky = getComputedStyle($("ask")).position === "sticky" ? $("ask").offsetHeight : 0;
  document.documentElement.style.setProperty("scroll-padding-bottom", `${sticky + 8}px`);
  const tall = element.offsetHeight > innerHeight - sticky;
  element.scrollIntoView({ block: tall ? "start" : "end", behavior: still ? "auto" : "smooth" });
}

// --- events ------------------------------------------------------------------------------------

function listen() {
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    state.key = $("key").value.trim();
    loadModels();
  });
  $("model").addEventListener("change", () => chooseModel().then(() => showError(null), showError));
  $("settings-form").addEventListener("submit", (event) => event.preventDefault());
  $("compare").addEventListener("change", () => {
    $("depth-b").hidden = !$("compare").checked;
    showSettings();
  });
  $("rule").addEventListener("change", showRuleFields);
  $("numbers").addEventListener("change", () =>
    document.body.classList.toggle("numbers", $("numbers").checked));
  for (const radio of document.querySelectorAll("input[name=mode]")) {
    radio.addEventListener("change", startAgain);
  }
  $("size").addEventListener("change", pickPuzzle);
  $("another").addEventListener("click", pickPuzzle);
  $("ask-all").addEventListener("click", askAll);
  $("read").addEventListener("click", readMap);
  $("clear").addEventListener("click", () => {
    startAgain();
    $("prompt").focus();
  });
  $("stop").addEventListener("click", () => state.running?.abort());
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    if ($("tip").hidden) state.running?.abort();
    else hideTip();
  });
  const wide = matchMedia("(min-width: 62rem)");
  const fit = () => {
    $("settings").open = wide.matches;
  };
  wide.addEventListener("change", fit);
  fit();
}

listen();
loadModels();
