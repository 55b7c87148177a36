"use strict";
(() => {
  const methods = JSON.parse(document.getElementById("methods").textContent);
  const form = document.getElementById("filters");
  const body = document.querySelector("#cells tbody");
  const rows = [...body.rows];
  const dimensions = ["family", "scaling", "expert", "count", "construction", "topology"];
  const joined = [...document.querySelectorAll("#joined tbody tr")];
  const plots = []; // of each figure that was drawn: its sources, each with the whole of its data

  // Whether a method, under the printed name of a series, passes the filters by method.
  const wanted = (method, series) => {
    const text = form.elements.text.value.trim().toLowerCase();
    const place = methods[method] || {};
    return dimensions.every((d) => !form.elements[d].value || place[d] === form.elements[d].value)
      && (!text || `${method} ${series}`.toLowerCase().includes(text));
  };

  // Show of a figure's sources what passes; a figure of which nothing is left goes, with what it holds.
  const narrow = ({ figure, sources, range, factors }) => {
    const kept = sources.map(({ whole }) => [...whole.series.keys()].filter((i) => wanted(whole.method[i], whole.series[i])));
    figure.hidden = kept.every((rows) => rows.length === 0);
    if (figure.hidden) return;
    sources.forEach(({ source, whole }, s) => {
      source.data = Object.fromEntries(Object.entries(whole).map(([name, column]) => [name, kept[s].map((i) => column[i])]));
    });
    if (range) {
      const bars = new Set(sources.flatMap(({ source }) => source.data.bar));
      range.factors = factors.filter((f) => bars.has(f));
    }
  };

  const filter = () => {
    let shown = 0;
    for (const row of rows) {
      const own = ["suite", "mode", "status"].every((k) => !form.elements[k].value || row.dataset[k] === form.elements[k].value);
      row.hidden = !(own && wanted(row.dataset.method, row.dataset.series));
      shown += row.hidden ? 0 : 1;
    }
    for (const row of joined) row.hidden = !wanted(row.dataset.method, row.dataset.series);
    document.getElementById("shown").textContent = `${shown} of ${rows.length} cells`;
    plots.forEach(narrow);
  };

  // The text that was deflated and written as base64.
  const unpack = (text) => new Response(
    new Blob([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))]).stream().pipeThrough(new DecompressionStream("deflate")),
  ).text();

  const draw = async (figure) => {
    const target = figure.querySelector(".plot");
    target.id = `plot-${[...document.querySelectorAll(".plot")].indexOf(target)}`;
    const item = JSON.parse(await unpack(figure.querySelector("script").textContent));
    const views = await Bokeh.embed.embed_item(item, target.id);
    const model = [...views][0].model;
    const sources = model.renderers.map(({ data_source: source }) => ({
      source, whole: Object.fromEntries(Object.entries(source.data).map(([name, column]) => [name, [...column]])),
    }));
    const range = sources.some(({ whole }) => whole.bar) ? model.y_range : null;
    const plot = { figure, sources, range, factors: range ? [...range.factors] : [] };
    plots.push(plot);
    narrow(plot);
  };

  // A plot is drawn when it first comes near the screen: a page may hold a hundred.
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((e) => e.isIntersecting)) {
      watch.unobserve(entry.target);
      draw(entry.target);
    }
  }, { rootMargin: "400px" });
  document.querySelectorAll("figure").forEach((figure) => watch.observe(figure));

  const cell = (row, i) => {
    const { classList, dataset, textContent } = row.cells[i];
    if (!classList.contains("n")) return textContent;
    const text = dataset.v ?? textContent;
    return text === "" || text === "\u2013" ? null : Number(text);
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
  for (const table of document.querySelectorAll(".wide table")) {
    const heads = [...table.querySelectorAll("th")];
    const lines = [...table.tBodies[0].rows];
    heads.forEach((head, i) => head.querySelector("button")?.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((h) => h.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const keys = new Map(lines.map((row) => [row, cell(row, i)]));
      const rank = (key) => (key === null ? 2 : typeof key === "number" ? 0 : 1); // numbers, words such as failures, nothing
      const known = lines.filter((row) => keys.get(row) !== null);
      known.sort((a, b) => rank(keys.get(a)) - rank(keys.get(b)) || (down ? -1 : 1) * compare(keys.get(a), keys.get(b)));
      table.tBodies[0].append(...known, ...lines.filter((row) => keys.get(row) === null));
    }));
  }

  // How a cell is run again is unpacked when it is first asked for.
  let again = null;
  const numbers = new Map(rows.map((row, i) => [row, i]));
  body.addEventListener("toggle", async ({ target }) => {
    if (!target.open || target.childElementCount > 1) return;
    again ??= unpack(document.getElementById("again").textContent).then(JSON.parse);
    const [why, command, facts] = (await again)[numbers.get(target.closest("tr"))];
    for (const [tag, text] of [["p", why], ["code", command], ["p", facts]]) {
      if (text) target.append(Object.assign(document.createElement(tag), { textContent: text }));
    }
  }, true);

  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  filter();
})();
