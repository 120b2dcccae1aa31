/* The page of verdicts, judged again as its reader sets it.

Without this script the page stands as it was registered. The script reads the claims from the page
itself, so that it works from a folder too, and asks no server for anything. The first half says in
JavaScript what kdutils/verdicts.py and kdutils/claims.py say in Python; tests/test_live.py holds
the two together. */
"use strict";

const verdicts = (() => {
  const REPLICATED = "replicated", SMALLER = "replicated, smaller", NO_EFFECT = "no effect";
  const REVERSED = "reversed", INCONCLUSIVE = "inconclusive", NONE = "no verdict";
  const WORDS = [REVERSED, NO_EFFECT, INCONCLUSIVE, SMALLER, REPLICATED]; // the weakest first

  // ------------------------------------------------------------------------- numbers

  /** A double as a whole number of 2^-1074, the smallest one. */
  function whole(x) {
    const view = new DataView(new ArrayBuffer(8));
    view.setFloat64(0, Math.abs(x));
    const bits = view.getBigUint64(0), exponent = bits >> 52n;
    const fraction = bits & 0xfffffffffffffn;
    const size = exponent ? (fraction | (1n << 52n)) << (exponent - 1n) : fraction;
    return x < 0 ? -size : size;
  }

  /** The double next to a / b, of whole numbers with b above 0. */
  function quotient(a, b) {
    const digits = (n) => 4 * n.toString(16).length;
    const size = a < 0n ? -a : a;
    const shift = digits(size) - digits(b) - 64;
    const top = size << BigInt(Math.max(-shift, 0)), below = b << BigInt(Math.max(shift, 0));
    let found = top / below;
    if (found * below !== top) found |= 1n; // the rest rounds what would be a tie
    return Number(a < 0n ? -found : found) * 2 ** shift;
  }

  const total = (numbers) => numbers.reduce((sum, n) => sum + n, 0n);

  /** Sums are exact, so that equal values have no spread and their order does not matter. */
  const mean = (x) => quotient(total(x.map(whole)), BigInt(x.length) << 1074n);

  function stdev(x) {
    const n = BigInt(x.length), numbers = x.map(whole), sum = total(numbers);
    const squares = total(numbers.map((k) => k * k));
    return Math.sqrt(quotient(n * squares - sum * sum, (n * (n - 1n)) << 2148n));
  }

  const LANCZOS = [0.99999999999980993, 676.5203681218851, -1259.1392167224028, 771.32342877765313,
    -176.61502916214059, 12.507343278686905, -0.13857109526572012, 9.9843695780195716e-6,
    1.5056327351493116e-7];

  /** The logarithm of the gamma function of x > 0. */
  function lgamma(x) {
    if (x < 0.5) return Math.log(Math.PI / Math.sin(Math.PI * x)) - lgamma(1 - x);
    const t = x + 6.5;
    const sum = LANCZOS.reduce((all, c, k) => (k ? all + c / (x - 1 + k) : c), 0);
    return 0.5 * Math.log(2 * Math.PI) + (x - 0.5) * Math.log(t) - t + Math.log(sum);
  }

  /** The regularised incomplete beta function of x = 1 - y, by its continued fraction (Lentz). */
  function beta(a, b, x, y) {
    const other = x > (a + 1) / (a + b + 2); // where the fraction of 1 - x converges faster
    if (other) [a, b, x, y] = [b, a, y, x];
    const log = (u, v) => (u < 0.5 ? Math.log(u) : Math.log1p(-v));
    const front = lgamma(a + b) - lgamma(a) - lgamma(b) + a * log(x, y) + b * log(y, x);
    const solid = (v) => (Math.abs(v) < 1e-300 ? 1e-300 : v);
    let c = 1, d = 1 / solid(1 - ((a + b) * x) / (a + 1)), fraction = d;
    for (let m = 1, step = 0; m < 20000 && Math.abs(step - 1) > 1e-16; m++) {
      const k = a + 2 * m;
      step = 1;
      for (const u of [(m * (b - m) * x) / ((k - 1) * k),
        (-(a + m) * (a + b + m) * x) / (k * (k + 1))]) {
        d = 1 / solid(1 + u * d);
        c = solid(1 + u / c);
        step *= c * d;
      }
      fraction *= step;
    }
    const found = (Math.exp(front) * fraction) / a;
    return other ? 1 - found : found;
  }

  /** How likely Student's t is beyond ±t. */
  const tails = (t, df) => beta(df / 2, 0.5, 1 / (1 + (t * t) / df), 1 / (1 + df / (t * t)));

  const known = new Map();

  /** The t within which Student's t lies with this confidence: halved until nothing is between. */
  function quantile(confidence, df) {
    const name = `${confidence} ${df}`;
    if (known.has(name)) return known.get(name);
    let low = 0, high = 1;
    while (tails(high, df) > 1 - confidence) high *= 2;
    for (let t = high / 2; low < t && t < high; t = (low + high) / 2) {
      if (tails(t, df) > 1 - confidence) low = t;
      else high = t;
    }
    known.set(name, high);
    return high;
  }

  // ------------------------------------------------------------------------- verdicts

  const side = (rule) => (["below", "at most", "every below"].includes(rule.kind) ? -1 : 1);
  const scaled = (rule, value) => (rule.ratio ? Math.log(value) : value);
  const beyond = (rule, value) => side(rule) * (scaled(rule, value) - scaled(rule, rule.bound));
  const reached = (rule, far) => beyond(rule, rule.bound + side(rule) * far);

  function judge(rule, values, confidence) {
    const n = values.length, verdict = { word: null, mean: null, low: null, high: null, n };
    Object.assign(verdict, { p: null, lead: 0, excluded: null, part: "" });
    if (n < 2) return verdict;
    const x = values.map((value) => scaled(rule, value)), centre = mean(x);
    const every = rule.kind.startsWith("every");
    const half = (quantile(confidence, n - 1) * stdev(x)) / Math.sqrt(n);
    const low = every ? Math.min(...x) : centre - half;
    const high = every ? Math.max(...x) : centre + half;
    const start = scaled(rule, rule.bound);
    const ends = [side(rule) * (low - start), side(rule) * (high - start)];
    const near = Math.min(...ends), far = Math.max(...ends);
    const effect = rule.effect === null ? null : reached(rule, rule.effect);
    const by = (inside, outside) => (inside ? REPLICATED : outside ? REVERSED : INCONCLUSIVE);
    if (rule.kind === "above" || rule.kind === "below") {
      verdict.word = by(near > 0, far < 0);
      if (near > 0 && effect !== null && far < effect) verdict.word = SMALLER;
      if (near <= 0 && far >= 0 && rule.margin && far < reached(rule, rule.margin)) {
        verdict.word = NO_EFFECT;
      }
      const error = (high - centre) / quantile(confidence, n - 1);
      const t = Math.abs(centre - start) / error;
      verdict.p = high === centre ? Number(centre === start) : tails(t, n - 1);
    } else if (rule.kind === "within") {
      const end = scaled(rule, rule.upper);
      verdict.word = by(start <= low && high <= end, high < start || low > end);
    } else {
      verdict.word = every ? by(near > 0, far <= 0) : by(near >= 0, far < 0);
    }
    const back = rule.ratio ? Math.exp : Number;
    Object.assign(verdict, { mean: back(centre), low: back(low), high: back(high) });
    verdict.lead = side(rule) * (centre - start);
    verdict.excluded = effect === null ? null : !(near <= effect && effect <= far);
    return verdict;
  }

  /** A claim of several parts: as its weakest, or as the need-th strongest of them. */
  function weakest(parts, need) {
    const named = Object.entries(parts).map(([part, verdict]) => ({ ...verdict, part }));
    const open = named.filter((one) => one.word === null);
    if (open.length) return open.reduce((least, one) => (one.n < least.n ? one : least));
    const rank = (one) => WORDS.indexOf(one.word);
    const ordered = [...named].sort((a, b) => rank(b) - rank(a) || b.lead - a.lead);
    const place = (need ?? named.length) - 1, chosen = ordered[place];
    if (named.some((one) => one.p === null)) return chosen;
    const reversed = chosen.word === REVERSED; // by this part and those behind it
    const ps = (reversed ? ordered.slice(place) : named).map((one) => one.p).sort((a, b) => a - b);
    const p = reversed ? ps.at(-1) : ps[place];
    return { ...chosen, p: Math.min(1, p * (need || reversed ? named.length : 1)) };
  }

  /** Which of these p, by name, survive Holm's correction. */
  function holm(ps, level) {
    const names = Object.keys(ps).sort((a, b) => ps[a] - ps[b]), passed = {};
    names.forEach((name, tried) => {
      const before = tried === 0 || passed[names[tried - 1]];
      passed[name] = before && ps[name] <= level / (names.length - tried);
    });
    return passed;
  }

  /** How many seeds of this spread would decide: `verdicts.seeds_needed` of kdutils. */
  function seedsNeeded(rule, values, confidence) {
    if (values.length < 2 || rule.kind.startsWith("every")) return null;
    const all = values.map((value) => scaled(rule, value)), spread = stdev(all);
    let half = Math.abs(reached(rule, rule.margin || 0)) / 2;
    if (!["above", "below"].includes(rule.kind)) {
      const ends = [rule.bound, rule.kind === "within" ? rule.upper : rule.bound];
      half = Math.min(...ends.map((end) => Math.abs(mean(all) - scaled(rule, end))));
    }
    if (!half) return null;
    const wide = (n) => tails((half * Math.sqrt(n)) / spread, n - 1) > 1 - confidence;
    let low = 1, high = 2;
    while (wide(high)) [low, high] = [high, 2 * high];
    while (high - low > 1) {
      const n = Math.floor((low + high) / 2);
      if (wide(n)) low = n;
      else high = n;
    }
    return high;
  }

  // ------------------------------------------------------------------------- claims

  const REGISTERED = { level: 95, correction: "study", margin: 1, epoch: "last", study: "",
    word: "", out: [] };

  /** Every claim with what its values say of it, as the reader has set it. */
  function judged(claims, state) {
    const confidence = state.level / 100;
    const rows = claims.map((claim) => {
      const [, need, kind] = claim.kind.match(/^(?:all |any (\d+) of )?(.+)$/);
      const rules = {}, values = {}, each = {};
      for (const [part, { effect, ...taken }] of Object.entries(claim.parts)) {
        const bySeed = taken[state.epoch] ?? taken.values; // an epoch that a claim may not have
        const { bound, upper, margin } = claim, ratio = claim.unit === "ratio";
        rules[part] = { kind, bound, upper, margin: margin * state.margin, effect, ratio };
        const counted = ([seed]) => !state.out.includes(`${claim.study}.${seed}`);
        values[part] = Object.entries(bySeed).filter(counted).map(([, value]) => value);
        const complete = Object.keys(bySeed).length === claim.seeds;
        each[part] = judge(rules[part], complete ? values[part] : [], confidence);
        each[part].n = values[part].length;
      }
      const found = weakest(each, need && Number(need)), rule = rules[found.part];
      const open = (part) => found.word === INCONCLUSIVE && each[part].word === INCONCLUSIVE;
      const needed = Object.keys(rules).filter(open)
        .map((part) => seedsNeeded(rules[part], values[part], confidence));
      const unit = Math.abs(reached(rule, claim.margin)); // pictures are in registered margins
      const [mean, low, high] = ["mean", "low", "high"].map((k) => beyond(rule, found[k]) / unit);
      const margins = found.mean === null ? null : {
        mean, low, high,
        effect: rule.effect === null ? null : reached(rule, rule.effect) / unit,
        margin: rule.margin ? reached(rule, rule.margin) / unit : null,
        seeds: values[found.part].map((value) => beyond(rule, value) / unit),
      };
      return {
        ...claim, ...found, registered: claim.verdict, verdict: found.word, found: found.n,
        paper: rule.effect === null ? null : rule.bound + side(rule) * rule.effect,
        needed: needed.length && !needed.includes(null) ? Math.max(...needed) : null, margins,
      };
    });
    const group = { study: (row) => row.study, all: () => "all", none: () => null };
    const families = {};
    for (const row of rows) {
      const name = group[state.correction](row);
      if (name !== null && row.p !== null) (families[name] ??= {})[row.id] = row.p;
    }
    const all = Object.values(families).map((ps) => holm(ps, (100 - state.level) / 100));
    const survived = Object.assign({}, ...all);
    return rows.map((row) => ({ ...row, holm: survived[row.id] ?? null }));
  }

  // ------------------------------------------------------------------------- words

  /** As Python writes it: ties to the even digit, and no minus for what rounds to 0. */
  function fixed(value, digits) {
    const size = Math.abs(value);
    let text = size.toFixed(digits);
    const [before, after] = size.toFixed(60).split(".");
    const even = (before + after.slice(0, digits)).at(-1) % 2 === 0;
    if (even && /^50*$/.test(after.slice(digits))) {
      text = digits ? `${before}.${after.slice(0, digits)}` : before;
    }
    return value < 0 && Number(text) ? `−${text}` : text;
  }

  function said(value, unit, units) {
    const [factor, digits, behind] = units[unit], text = fixed(value * factor, digits);
    return `${unit === "ratio" || text.startsWith("−") ? "" : "+"}${text}${behind}`;
  }

  function saidWithInterval(row, units) {
    if (row.mean === null) return `${row.found} of ${row.seeds} seeds`;
    const [factor, digits] = units[row.unit];
    const [low, high] = [row.low, row.high].map((end) => fixed(end * factor, digits));
    return `${said(row.mean, row.unit, units)} (${low} to ${high})`;
  }

  function tally(rows) {
    const names = { [NO_EFFECT]: "with no effect", [SMALLER]: "replicated (smaller)" };
    const count = (word) => rows.filter((row) => row.verdict === word).length;
    const counted = [...[...WORDS].reverse(), null].filter(count);
    const listed = counted.map((w) => `${count(w)} ${w ? names[w] ?? w : "not judged yet"}`);
    const last = listed.pop() ?? "none";
    const before = listed.length ? `${listed.join(", ")} and ` : "";
    return `Of ${rows.length} claims: ${before}${last}.`;
  }

  function correction(rows, state) {
    if (state.correction === "none") return "";
    const held = rows.filter((r) => r.verdict?.startsWith(REPLICATED) && r.holm !== null);
    const survive = held.filter((row) => row.holm).length;
    const over = state.correction === "all" ? "all claims" : "their study’s claims";
    return `${survive} of the ${held.length} replicated with a p-value survive a correction for ${over}.`;
  }

  function settings(state) {
    const set = [];
    if (state.level !== 95) set.push(`at ${state.level} %`);
    const times = { 0.5: "at half the margins", 2: "at twice the margins" };
    if (state.margin !== 1) set.push(times[state.margin] ?? "without margins");
    const epochs = { chosen: "by epochs chosen on held-out pictures", best: "by best epochs on test" };
    if (state.epoch !== "last") set.push(epochs[state.epoch]);
    const count = state.out.length;
    if (count) set.push(`without ${count} seed${count > 1 ? "s" : ""}`);
    return set.length ? `Judged ${set.join(", ")}.` : "As registered.";
  }

  return {
    WORDS, NONE, REGISTERED, tails, quantile, mean, stdev, judge, weakest, holm,
    seedsNeeded, judged, fixed, said, saidWithInterval, tally, correction, settings,
  };
})();

// ----------------------------------------------------------------------------- the page

(() => {
  const v = verdicts, data = document.getElementById("claims");
  const first = document.getElementById("fig-verdicts-tally");
  if (!data || !first) return;
  const { units, rows: claims } = JSON.parse(data.textContent);
  const studies = [...new Set(claims.map((claim) => claim.study))];
  const seedNames = new Set(claims.flatMap(({ study, parts }) =>
    Object.values(parts).flatMap((part) => Object.keys(part.values).map((s) => `${study}.${s}`))));
  const SETS = { level: [95, 90, 99], correction: ["study", "none", "all"], margin: [1, 0.5, 2, 0],
    epoch: ["last", "chosen", "best"], study: ["", ...studies],
    word: ["", ...[...v.WORDS].reverse(), v.NONE, "differs"] };
  const RECORD = "../book/record.html?of="; // where a claim's values and runs are
  let state = read(), shown = [];

  // ------------------------------------------------------------------------- the address

  function read() {
    const given = new URLSearchParams(location.search), found = { ...v.REGISTERED };
    for (const [name, allowed] of Object.entries(SETS)) {
      found[name] = allowed.find((one) => String(one) === given.get(name)) ?? v.REGISTERED[name];
    }
    return { ...found, out: [...seedNames].filter((name) => given.getAll("out").includes(name)) };
  }

  function asked() {
    const kept = new URLSearchParams();
    for (const name of Object.keys(SETS)) {
      if (state[name] !== v.REGISTERED[name]) kept.set(name, state[name]);
    }
    for (const name of state.out) kept.append("out", name);
    return String(kept) && `?${kept}`;
  }

  // ------------------------------------------------------------------------- controls

  function make(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  const FAMILIES = { study: "by study", none: "none", all: "over all" };
  const SAID = { // of each control: its name, and what a value is called
    level: ["Confidence", (level) => `${level} %`],
    correction: ["Holm’s correction", (one) => FAMILIES[one]],
    margin: ["Margin", (one) => ({ 1: "as registered", 0.5: "× ½", 2: "× 2", 0: "0" })[one]],
    epoch: ["Epoch", (one) => ({ last: "the last", chosen: "chosen", best: "best on test" })[one]],
    study: ["Study", (study) => study || "all"],
    word: ["Verdict", (word) => (word === "differs" ? "not as registered" : word || "all")],
  };

  const status = make("p", { role: "status" });
  const form = make("form", { "aria-label": "Judge the claims otherwise" });
  for (const [name, values] of Object.entries(SETS)) {
    const [label, text] = SAID[name];
    const options = values.map((value) => make("option", { value }, text(value)));
    const id = `live-${name}`, about = { id, name, autocomplete: "off" };
    const select = make("select", about, ...options);
    form.append(make("div", {}, make("label", { for: id }, label), select));
  }
  const back = make("button", { type: "button" }, "Back to as registered");
  const details = make("details", {}, make("summary", {}, "Judge otherwise"), form);
  const about = { class: "live", "aria-label": "The claims, judged anew" };
  const panel = make("section", about, status, make("div", {}, details, back));
  details.open = matchMedia("(min-width: 720px)").matches;
  (first.closest(".cell") ?? first).before(panel);

  const places = studies.map((study) => {
    const figure = document.getElementById(`fig-verdicts-${study}`);
    const boxes = [...seedNames].filter((name) => name.startsWith(`${study}.`)).map((name) => {
      const box = make("input", { type: "checkbox", value: name, autocomplete: "off" });
      return make("label", {}, box, ` ${name.slice(study.length + 1)}`);
    });
    const legend = make("legend", {}, "Seeds that count");
    const seeds = make("fieldset", { class: "live-seeds" }, legend, ...boxes);
    const none = make("p", { class: "live-none" }, "None of this study’s claims is shown.");
    figure.before(...(boxes.length ? [seeds] : []), none);
    return { study, figure, seeds, none };
  });
  const lines = new Map([...document.querySelectorAll("div.claims tbody tr")]
    .map((line) => [line.cells[0].firstChild.textContent, line]));

  form.addEventListener("change", ({ target }) => {
    const value = SETS[target.name].find((one) => String(one) === target.value);
    change({ [target.name]: value });
  });
  back.addEventListener("click", () => change({ ...v.REGISTERED }));
  for (const { seeds } of places) {
    seeds.addEventListener("change", ({ target: { value, checked } }) => {
      const out = new Set(state.out);
      if (checked) out.delete(value);
      else out.add(value);
      change({ out: [...seedNames].filter((name) => out.has(name)) });
    });
  }

  function change(set) {
    state = { ...state, ...set };
    render();
    history.replaceState(null, "", location.pathname + asked() + location.hash);
  }

  // ------------------------------------------------------------------------- words and numbers

  function fill(cell, ...texts) {
    const kept = texts.filter((text) => text !== "");
    cell.replaceChildren(...kept.flatMap((text, k) => (k ? [make("br"), text] : [text])));
  }

  function fillLine(row) {
    const line = lines.get(row.id), word = row.verdict ?? v.NONE;
    if (!line) return;
    const [name, , effect, ours, seeds, holm] = line.cells;
    const sign = word.split(",")[0].replace(" ", "-");
    const was = row.verdict === row.registered ? ""
      : make("span", { class: "was" }, `registered: ${row.registered ?? v.NONE}`);
    const record = { class: "claim", href: `${RECORD}${row.id}` };
    fill(name, make("a", record, row.id), make("span", { class: `verdict ${sign}` }, word), was);
    const paper = row.paper === null ? "–" : v.said(row.paper, row.unit, units);
    fill(effect, paper, row.excluded ? "(excluded)" : "");
    const found = row.mean === null ? "–" : v.saidWithInterval(row, units);
    fill(ours, found, row.part && `(${row.part})`);
    const needed = row.needed ? `(${row.needed.toLocaleString("en")} would decide)` : "";
    fill(seeds, `${row.found} of ${row.seeds}`, needed);
    fill(holm, { true: "yes", false: "no", null: "–" }[row.holm]);
    line.hidden = !shown.includes(row);
  }

  function render() {
    const rows = v.judged(claims, state);
    const differs = (row) => row.verdict !== row.registered;
    const chosen = rows.filter((row) => !state.study || row.study === state.study);
    shown = chosen.filter((row) => !state.word ||
      (state.word === "differs" ? differs(row) : (row.verdict ?? v.NONE) === state.word));
    rows.forEach(fillLine);
    for (const head of document.querySelectorAll("div.claims thead th:nth-child(4)")) {
      head.textContent = `ours (${state.level} %)`;
    }
    const count = chosen.filter(differs).length;
    const differ = count > 1 ? "words differ" : "word differs";
    const other = count ? `${count} ${differ} from the registered.` : "";
    const part = state.word ? `Shown: ${shown.length}.` : "";
    const touched = asked() !== "";
    const tallied = [v.tally(chosen), v.correction(chosen, state), other, part];
    status.textContent = [v.settings(state), ...(touched ? tallied : [])].filter(Boolean).join(" ");
    for (const select of form.querySelectorAll("select")) select.value = state[select.name];
    for (const { study, figure, seeds, none } of places) {
      const empty = !shown.some((row) => row.study === study);
      none.hidden = !empty;
      figure.hidden = empty;
      seeds.hidden = state.study !== "" && state.study !== study;
      for (const box of seeds.querySelectorAll("input")) {
        box.checked = !state.out.includes(box.value);
      }
      const caption = figure.querySelector(".caption-text");
      if (caption) caption.textContent = caption.textContent.replace(/\d+ %/, `${state.level} %`);
    }
    for (const table of document.querySelectorAll("details:has(div.claims)")) {
      table.hidden = !table.querySelector("tbody tr:not([hidden])");
    }
    panel.classList.toggle("touched", touched);
    clear();
    draw(chosen);
  }

  /** Keep the headings that a link leads to clear of the box, which stays in sight. */
  function clear() {
    const covered = panel.classList.contains("touched") ? `${panel.offsetHeight + 72}px` : "";
    document.documentElement.style.scrollPaddingTop = covered;
  }

  // ------------------------------------------------------------------------- pictures

  const REACH = 4.5, CIRCLE = "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z";
  const SIGNS = { // a verdict's class and marker
    "replicated": ["replicated", CIRCLE],
    "replicated, smaller": ["smaller", "M0-6L5.7-1.9 3.5 4.9-3.5 4.9-5.7-1.9z"],
    "no effect": ["no-effect", "M-5-5h10v10h-10z"],
    "reversed": ["reversed", "M-6-3l3-3 3 3 3-3 3 3-3 3 3 3-3 3-3-3-3 3-3-3 3-3z"],
    "inconclusive": ["inconclusive", CIRCLE],
    "no verdict": ["no-verdict", "M-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0z"],
  };
  const RIGHT = "M-5-6L6 0-5 6z", LEFT = "M5-6L-6 0 5 6z", DIAMOND = "M0-6L6 0 0 6-6 0z";
  const pen = document.createElement("canvas").getContext("2d");

  function svg(name, attributes = {}, text = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = text;
    return made;
  }

  function wide(text, font) {
    pen.font = font;
    return pen.measureText(text).width;
  }

  function wrap(text, width, font) {
    const wrapped = [""];
    for (const word of text.split(" ")) {
      const longer = `${wrapped.at(-1)} ${word}`.trimStart();
      if (wrapped.at(-1) && wide(longer, font) > width) wrapped.push(word);
      else wrapped[wrapped.length - 1] = longer;
    }
    return wrapped;
  }

  /** Put a picture in the place of a figure's static one, with the same words for who hears it. */
  function place(figure, width, height, parts) {
    const image = figure.querySelector("img");
    const about = { role: "group", "aria-label": image.alt, class: "live", width, height };
    const picture = svg("svg", { ...about, viewBox: `0 0 ${width} ${height}` });
    picture.append(...parts);
    figure.querySelector("svg")?.remove();
    image.hidden = true;
    image.before(picture);
  }

  function draw(chosen) {
    const width = Math.min(panel.clientWidth, 720);
    const family = getComputedStyle(panel).fontFamily;
    bars(chosen, width);
    for (const { study, figure } of places) {
      const rows = shown.filter((row) => row.study === study);
      if (rows.length) forest(figure, rows, width, family);
    }
  }

  function forest(figure, rows, width, family) {
    const parts = [], small = `13px ${family}`, bold = `600 13px ${family}`;
    const clip = (value) => Math.max(-REACH, Math.min(REACH, value));
    const at = (value) => 12 + ((clip(value) + REACH) / (2 * REACH)) * (width - 24);
    const text = (x, y, words, className) =>
      parts.push(svg("text", { x, y, class: className }, words));
    const mark = (shape, x, y, className) =>
      parts.push(svg("path", { d: shape, transform: `translate(${x} ${y})`, class: className }));
    let y = 0;
    rows.forEach((row, k) => {
      const band = svg("rect", { x: 0, y, width, class: k % 2 ? "band" : "no-band" });
      parts.push(band);
      const top = y;
      y += 6;
      const link = svg("a", { href: `${RECORD}${row.id}` });
      for (const line of wrap(`${row.id} ${row.statement}`, width - 12, `14px ${family}`)) {
        link.append(svg("text", { x: 6, y: (y += 17), class: "statement" }, line));
      }
      parts.push(link);
      const middle = y + 18, span = { y1: middle - 9, y2: middle + 9 };
      const [sign, shape] = SIGNS[row.verdict ?? v.NONE];
      parts.push(svg("line", { x1: at(0), x2: at(0), ...span, class: "bound" }));
      const margin = row.margins ? row.margins.margin : state.margin;
      if (margin) {
        parts.push(svg("line", { x1: at(margin), x2: at(margin), ...span, class: "margin" }));
      }
      if (row.margins) {
        const { mean, low, high, effect, seeds } = row.margins;
        const was = registered.get(row.id).margins;
        const edge = (value, otherwise) =>
          (value >= REACH ? RIGHT : value <= -REACH ? LEFT : otherwise);
        if (was && (was.low !== low || was.high !== high)) {
          const old = { x1: at(was.low), x2: at(was.high), y1: middle + 7, y2: middle + 7 };
          parts.push(svg("line", { ...old, class: "was" }));
        }
        const line = { x1: at(low), x2: at(high), y1: middle, y2: middle };
        parts.push(svg("line", { ...line, class: `span ${sign}` }));
        for (const seed of seeds.filter((value) => Math.abs(value) <= REACH)) {
          parts.push(svg("circle", { cx: at(seed), cy: middle - 6, r: 1.8, class: "seed" }));
        }
        mark(edge(mean, shape), at(mean), middle, `mark ${sign}`);
        if (effect !== null) mark(edge(effect, DIAMOND), at(effect), middle, "paper");
      }
      y = middle + 26;
      const said = v.saidWithInterval(row, units) + (row.part && ` [${row.part}]`);
      const word = row.verdict ?? v.NONE, was = row.registered ?? v.NONE;
      const before = word === was ? "" : `${was} `;
      text(6, y, said, "said");
      if (wide(said, small) + wide(before + word, bold) + 24 > width) y += 17;
      const label = svg("text", { x: width - 6, y, class: "word" });
      if (before) label.append(svg("tspan", { class: "was" }, was), svg("tspan", {}, ` ${word}`));
      else label.textContent = word;
      parts.push(label);
      y += 8;
      band.setAttribute("height", y - top);
    });
    parts.push(svg("line", { x1: 0, x2: width, y1: y + 2, y2: y + 2, class: "margin" }));
    for (const tick of [-4, -2, 0, 2, 4]) {
      const label = String(tick).replace("-", "−");
      parts.push(svg("text", { x: at(tick), y: y + 19, class: "tick" }, label));
    }
    const about = "beyond the bound, in registered margins (◇ the paper’s effect, dots: seeds)";
    for (const line of wrap(about, width - 12, small)) {
      parts.push(svg("text", { x: width / 2, y: y + 38, class: "tick" }, line));
      y += 17;
    }
    place(figure, width, y + 28, parts);
  }

  function bars(rows, width) {
    const parts = [], words = Object.keys(SIGNS), left = 84, step = 34;
    const size = (study) => claims.filter((claim) => claim.study === study).length;
    const unit = (Math.min(width, 560) - left - 4) / Math.max(...studies.map(size));
    const column = Math.min(width - 20, 420) / 2;
    words.forEach((word, k) => {
      const x = 10 + column * Math.floor(k / 3), y = 6 + 24 * (k % 3);
      parts.push(svg("rect", { x, y, width: 14, height: 14, class: SIGNS[word][0] }));
      parts.push(svg("text", { x: x + 22, y: y + 12, class: "said" }, word));
    });
    const names = studies.filter((study) => rows.some((row) => row.study === study));
    names.forEach((study, k) => {
      const y = 90 + step * k;
      let x = left;
      parts.push(svg("text", { x: left - 8, y: y + 18, class: "study" }, study));
      for (const word of words) {
        const own = rows.filter((row) => row.study === study && (row.verdict ?? v.NONE) === word);
        if (!own.length) continue;
        const [sign] = SIGNS[word], long = own.length * unit;
        parts.push(svg("rect", { x, y, width: long - 1.5, height: 26, class: sign }));
        const label = { x: x + long / 2, y: y + 18, class: `count on-${sign}` };
        parts.push(svg("text", label, own.length));
        x += long;
      }
    });
    place(first, Math.min(width, 560), 90 + step * names.length, parts);
  }

  const registered = new Map(v.judged(claims, v.REGISTERED).map((row) => [row.id, row]));
  render();
  let drawnAt = panel.clientWidth;
  new ResizeObserver(() => {
    if (panel.clientWidth !== drawnAt) render();
    else clear();
    drawnAt = panel.clientWidth;
  }).observe(panel);
})();
