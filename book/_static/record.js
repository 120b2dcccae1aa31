/* A claim with each seed's value and its runs, a run with what its record holds, or a list of all.

The address says which: ?of=vid-1, ?of=vid/alone-026cb865391e, or nothing. book/opened.py writes
what is shown as one script each, so that the page works from a folder too. */
"use strict";

(() => {
  const place = document.getElementById("opened");
  if (!place) return;
  const asked = new URLSearchParams(location.search).get("of") ?? "";
  const base = new URL("records/", document.currentScript.src);

  function make(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children.filter((one) => one !== null && one !== ""));
    return made;
  }

  const to = (name, text = name) => make("a", { href: `?of=${encodeURI(name)}` }, text);
  const code = (text) => make("code", {}, text);
  const list = (parts) => parts.flatMap((one, k) => (k ? [", ", one] : [one]));

  function table(head, rows, name) {
    const cell = (kind) => (one) => make(kind, {}, ...(Array.isArray(one) ? one : [one ?? "–"]));
    const line = (row) => make("tr", {}, ...row.map(cell("td")));
    const top = make("tr", {}, ...head.map(cell("th")));
    const body = [make("thead", {}, top), make("tbody", {}, ...rows.map(line))];
    return make("div", { class: "claims" }, make("table", { "aria-label": name }, ...body));
  }

  /** Names and values, a line each; what holds more becomes lines of their own. */
  function lines(value, before = "") {
    return Object.entries(value).flatMap(([key, one]) => {
      const name = before ? `${before} ${key}` : key;
      const inner = one && typeof one === "object" && !Array.isArray(one);
      return inner ? lines(one, name) : [[name, one]];
    });
  }

  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value));
  const short = (value) => (typeof value === "number" ? Number(value.toPrecision(6)) : text(value));

  /** Where in a record a value stands, history/29/test_accuracy, as a reader says it. */
  function said(path) {
    const [, row, name] = path.match(/^history\/(\d+)\/(.+)$/) ?? [];
    return name ? `${name.replaceAll("_", " ")} after epoch ${Number(row) + 1}` : path;
  }

  // ------------------------------------------------------------------------- a claim

  function claim(one, pages) {
    const word = one.verdict ?? "no verdict", sign = word.split(",")[0].replace(" ", "-");
    const several = one.values.some(([part]) => part);
    const rule = Object.entries(one.rule).map(([name, said]) => `${name} ${said}`).join(", ");
    const judged = make("p", {}, make("span", { class: `verdict ${sign}` }, word), ` ${one.said}`,
      one.part ? ` (decided by ${one.part})` : "");
    const about = [
      one.source.startsWith("ours") ? ["we ask", one.statement]
        : ["the paper says", `${one.statement} (${one.source})`],
      ["its number", one.effect ? `${one.paper_value}; effect ${one.effect}` : one.paper_value],
      ["quantity", one.quantity],
      ["registered", `${one.kind}; ${rule}; ${one.seeds} seeds`],
      ...(one.errata.length ? [["words put right", one.errata.join(" ")]] : []),
      ["Holm", one.verdict === null ? "not judged yet"
        : { true: "survives", false: "does not survive", null: "does not apply" }[one.holm]],
    ];
    const from = (sources) => sources.flatMap(([name, path, value], k) => [
      ...(k ? [make("br")] : []), `${short(value)}, ${said(path)} of `, to(name, name.split("/")[1] ?? name),
    ]);
    const rows = one.values.map(([part, seed, said, sources]) =>
      [...(several ? [part] : []), seed, said, from(sources)]);
    const head = [...(several ? ["part"] : []), "seed", "value", "taken from"];
    const study = make("a", { href: pages[one.study] }, "the study's page");
    const all = make("a", { href: `../notebooks/verdicts.html?study=${one.study}` }, "its verdicts");
    return [judged, table(["", one.id], about, `The claim ${one.id}`),
      make("p", {}, "Where it stands: ", study, ", ", all, "."),
      rows.length ? table(head, rows, "Values by seed")
        : make("p", {}, "None of its runs has been published yet.")];
  }

  // ------------------------------------------------------------------------- a run

  function svg(name, attributes = {}, words = "") {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.textContent = words;
    return made;
  }

  /** One measure against the epoch. */
  function curve(name, epochs, values) {
    const points = epochs.map((e, k) => [e, values[k]]).filter(([, v]) => Number.isFinite(v));
    const [xs, ys] = [0, 1].map((k) => points.map((point) => point[k]));
    const [left, right, low, high] =
      [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
    const at = (v, from, to, a, b) => (from === to ? (a + b) / 2 : a + ((v - from) / (to - from)) * (b - a));
    const spots = points.map(([x, y]) =>
      [at(x, left, right, 64, 500), at(y, low, high, 180, 16)].map((v) => v.toFixed(1)));
    const said = (v) => String(Number(v.toPrecision(3)));
    const about = `${name} from epoch ${left} to ${right}: between ${said(low)} and ${said(high)}, ` +
      `at the end ${said(ys.at(-1))}`;
    const drawing = svg("svg", { viewBox: "0 0 520 224", class: "curve", role: "img", "aria-label": about });
    drawing.append(svg("path", { d: "M64 10V186H506", class: "axis" }),
      svg("polyline", { points: spots.join(" "), class: "line" }),
      ...spots.map(([cx, cy]) => svg("circle", { cx, cy, r: 2.5, class: "spot" })),
      svg("text", { x: 58, y: 20, class: "end" }, said(high)),
      ...(low === high ? [] : [svg("text", { x: 58, y: 184, class: "end" }, said(low))]),
      svg("text", { x: 64, y: 204, class: "middle" }, left),
      ...(left === right ? [] : [svg("text", { x: 500, y: 204, class: "middle" }, right)]),
      svg("text", { x: 282, y: 218, class: "middle" }, "epoch"));
    return drawing;
  }

  function picture(history) {
    const { epoch: epochs, ...rest } = history;
    const names = Object.keys(rest).filter((name) => rest[name].some(Number.isFinite));
    if (!epochs || !names.length) return [];
    const first = ["test_accuracy", "validation_accuracy", "loss"].find((n) => names.includes(n));
    const select = make("select", { id: "measure", autocomplete: "off" },
      ...names.map((value) => make("option", { value }, value.replaceAll("_", " "))));
    select.value = first ?? names[0];
    const label = make("label", { for: "measure" }, "Measure");
    const figure = make("div", { class: "curve" });
    const draw = () => {
      const name = select.value.replaceAll("_", " "), values = rest[select.value];
      const each = epochs.map((epoch, k) => [String(epoch), text(values[k])]);
      const fold = make("details", {}, make("summary", {}, `As a table; at the end ${text(values.at(-1))}`),
        table(["epoch", name], each, name));
      figure.replaceChildren(curve(name, epochs, values), fold);
    };
    select.addEventListener("change", draw);
    draw();
    return [make("h2", {}, "Its history"), make("p", {}, label, " ", select), figure];
  }

  function run(one, pages) {
    const name = `${one.run}-${one.key}`, file = `data/records/${one.study}/${name}.json`;
    const at = (path) => `${one.repository}/${path}`;
    const { commit, register, ...made } = one.made;
    const value = ([key, v]) => {
      const shown = text(v);
      const teacher = one.taught[v];
      if (teacher) return [key, [to(teacher, `weights of ${teacher.split("/")[1]}`)]];
      return [key, shown.length > 40 ? [code(shown)] : shown];
    };
    const minutes = (made.seconds / 60).toFixed(1);
    const counts = one.claims.length ? list(one.claims.map((id) => to(id)))
      : ["no claim: it shows or teaches something else"];
    const stored = make("a", { href: at(`blob/${one.commit ?? "main"}/${file}`) }, file);
    const source = make("a", { href: at(`commit/${commit}`) }, commit.slice(0, 12));
    const weights = Object.entries(one.weights).map(([key, digest]) => [`weights ${key}`, digest]);
    return [
      make("p", {}, `A run of `, make("a", { href: pages[one.study] }, one.study),
        ` at scale ${one.scale}: ${one.status}, ${minutes} minutes. It counts for `, ...counts, "."),
      ...picture(one.history),
      make("h2", {}, "What went in"),
      table(["argument", "value"], lines(one.arguments).map(value), "Arguments"),
      make("h2", {}, "What came out"),
      table(["result", "value"], [...lines(one.results), ...weights].map(value), "Results"),
      make("h2", {}, "Where it was made"),
      table(["", "value"], [["commit", [source]],
        ...[...lines(made), ["register of claims", register]].filter(([, v]) => v !== undefined).map(value)],
        "Where it was made"),
      make("h2", {}, "Make it again"),
      make("pre", {}, `python -m kdutils verify ${one.study} --key ${one.key}`),
      make("p", {}, "makes the run again from nothing, its teachers too, and compares: every number where ",
        "processor, threads and versions are these, else the last accuracies. ",
        "The record itself, with all digits: ", stored, "."),
    ];
  }

  // ------------------------------------------------------------------------- all

  function all({ runs, claims }) {
    const find = make("input", { id: "find", type: "search", autocomplete: "off" });
    const label = make("label", { for: "find" }, "Find by name, scale, seed or claim");
    const listed = Object.entries(runs).map(([name, [scale, seed, minutes, ids]]) => {
      const [study] = name.split("/");
      const line = [[to(name)], scale, String(seed ?? "–"), String(minutes), list(ids.map((id) => to(id)))];
      const words = `${name} ${study} ${scale} seed ${seed} ${ids.join(" ")}`.toLowerCase();
      return { line, words };
    });
    const drawn = table(["run", "scale", "seed", "minutes", "counts for"],
      listed.map(({ line }) => line), "All runs");
    const shown = [...drawn.querySelectorAll("tbody tr")];
    const status = make("p", { role: "status" });
    const more = make("button", { type: "button" }, "Show all of them");
    let most = 20; // hundreds would bury the page's end
    const filter = () => {
      const wanted = find.value.toLowerCase().split(/\s+/).filter(Boolean);
      let count = 0;
      listed.forEach(({ words }, k) => {
        const fits = wanted.every((word) => words.includes(word));
        shown[k].hidden = !fits || count >= most;
        count += fits;
      });
      more.hidden = count <= most;
      status.textContent = `${count} of ${listed.length} runs` + (more.hidden ? "" : `, the first ${most} of them here`);
    };
    find.addEventListener("input", filter);
    more.addEventListener("click", () => {
      most = Infinity;
      filter();
    });
    filter();
    const rows = Object.entries(claims).map(([id, [statement, found]]) => [[to(id)], statement, found]);
    return [make("h2", {}, "All claims"), table(["claim", "what is claimed", "what was found"], rows, "All claims"),
      make("h2", {}, "All runs"), make("p", {}, label, " ", find), status, drawn, more];
  }

  // ------------------------------------------------------------------------- what is asked for

  const given = [];
  window.record = (content) => given.push(content);

  function load(name) {
    return new Promise((done, failed) => {
      const script = make("script", { src: new URL(`${name}.js`, base).href });
      script.onload = () => done(given.pop());
      script.onerror = () => failed(new Error(name));
      document.head.append(script);
    });
  }

  async function show() {
    const index = await load("index");
    if (!asked) return place.replaceChildren(...all(index));
    const known = asked in index.claims || asked in index.runs;
    if (!known) {
      const none = make("p", {}, "This book has no claim and no published run named ", code(asked), ".");
      return place.replaceChildren(none, ...all(index));
    }
    const one = await load(asked), named = asked.split("/").at(-1);
    document.querySelector("article h1").firstChild.textContent = named;
    document.title = document.title.replace(/^.*? — /, `${named} — `);
    const more = make("p", {}, make("a", { href: location.pathname }, "All claims and runs"));
    place.replaceChildren(...("values" in one ? claim : run)(one, index.pages), more);
  }

  show().catch((error) => place.replaceChildren(make("p", {},
    `${error.message} could not be read; the book may be from another build. Reload the page.`)));
})();
