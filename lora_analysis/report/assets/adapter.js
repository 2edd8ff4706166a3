"use strict";
// The page of one adapter: its map, its tables, and the module that is open.
(async () => {
  const { make } = report;
  const mapped = document.getElementById("map");
  const panel = document.getElementById("module");
  const number = Number(mapped.dataset.adapter);
  const several = document.querySelector("[data-table=pairs]");

  const data = await report.load(`adapter-${number}`);
  const { modules } = data;
  let state = {};

  function address(index) {
    return `#${new URLSearchParams({ module: modules[index].name })}`;
  }

  for (const element of document.querySelectorAll("[data-table]")) {
    const table = data.tables[element.dataset.table];
    if (!table) continue;
    const at = new Map(modules.map((m, i) => [m.name, i]));
    const names = table.columns.findIndex((c) => c.key === "module");
    report.table(element, table, { caption: element.dataset.table, link: (row) => address(at.get(table.rows[row][names])) });
  }
  if (several) partners(several).catch((error) => report.failed(several, error));

  async function partners(element) {
    const { pairs, table } = await report.pairsOf(number);
    const rows = table.pairs.flatMap((pair, i) => (pair.includes(number) ? [i] : []));
    const mine = { ...table, rows: rows.map((i) => table.rows[i]), name: `pairs-adapter-${number}` };
    report.table(element, mine, { caption: "this adapter with others", link: (i) => `../compare.html#${new URLSearchParams({ a: pairs[i][0], b: pairs[i][1] })}` });
  }

  function rowOf(name, index) {
    const table = data.tables[name];
    if (!table) return [];
    const at = table.columns.findIndex((c) => c.key === "module");
    return table.rows.filter((row) => row[at] === modules[index].name).map((row) => Object.fromEntries(table.columns.map((c, i) => [c.key, row[i]])));
  }

  function numbers(index) {
    const items = data.metrics.map((metric) => {
      const text = [make("span", {}, `${metric.label} `), make("b", {}, report.written(metric.values[index], metric.kind))];
      if (metric.low && metric.low[index] !== null) {
        const [low, high] = [metric.low[index], metric.high[index]].map((v) => report.written(v, metric.kind));
        text.push(make("span", {}, ` (${metric.word} ${low === high ? low : `${low} to ${high}`}${metric.plain?.[index] ? `; ${metric.plain_word}` : ""})`));
      }
      return make("li", {}, ...text);
    });
    const [rank] = rowOf("rank", index);
    const facts = `${rank.d_out} × ${rank.d_in}, r = ${rank.r}, scale ${report.figure(rank.scale)} from ${rank.scale_source}${rank.flags ? `; flags: ${rank.flags}` : ""}`;
    return [make("p", { class: "soft" }, facts), make("ul", { class: "numbers" }, ...items)];
  }

  async function show(index, focus) {
    const { name } = modules[index];
    report.map.mark(mapped, index);
    const title = make("h2", { tabindex: "-1" }, ...report.breakable(name));
    const copied = make("span", { class: "soft", role: "status" });
    const copy = async () => {
      try {
        await navigator.clipboard.writeText(location.href);
        copied.textContent = "copied";
      } catch {
        copied.textContent = "the address of this page leads here";
      }
    };
    const go = (to, label) => make("button", { type: "button", disabled: to < 0 || to >= modules.length, on: { click: () => open(to) } }, label);
    const spectrum = make("div", { class: "chart" });
    const gains = make("div", { class: "chart" });
    const amplified = rowOf("amplification", index);
    const grid = make("div");
    panel.hidden = false;
    panel.replaceChildren(
      make(
        "div", { class: "head" }, title,
        make("div", { class: "controls" }, go(index - 1, "← previous"), go(index + 1, "next →"), make("button", { type: "button", on: { click: copy } }, "Copy link"), copied, make("button", { type: "button", on: { click: close } }, "Close")),
      ),
      ...numbers(index),
      make(
        "div", { class: "charts" },
        make("figure", {}, make("h3", {}, "Spectrum"), spectrum, make("figcaption", {}, "Singular values over ‖ΔW‖ against random factors of the same shape. Hollow: below three storage-noise floors, where values are rounding.")),
        ...(amplified.length ? [make("figure", {}, make("h3", {}, "Amplification over k"), gains, make("figcaption", {}, "Gain (left) is 1 by chance; hollow: consistent with chance, q above 0.05. The factor (right) falls with k by chance, too."))] : []),
      ),
      ...(several ? [make("h3", {}, "φ against another adapter"), grid] : []),
    );
    if (focus) {
      title.focus({ preventScroll: true });
      panel.scrollIntoView({ block: "start" });
    }
    const spectra = await report.load(`spectra-${number}`);
    await report.spectrum(spectrum, spectra.modules[index], spectra.bands, name);
    if (amplified.length) await report.amplification(gains, amplified, name);
    if (several) await against(grid, name);
  }

  async function against(element, name) {
    const { names, pairs } = await report.pairsOf(number);
    const others = pairs.map(([a, b]) => (a === number ? b : a));
    if (!others.length) {
      element.replaceChildren(make("p", { class: "soft" }, "This adapter is not among those compared two by two."));
      return;
    }
    const chosen = others.includes(Number(state.with)) ? Number(state.with) : others[0];
    const area = make("div");
    const choose = report.select("with", others.map((one) => [one, names[one - 1]]), chosen, (value) => draw(Number(value)));
    element.replaceChildren(make("div", { class: "controls" }, choose), area);

    async function draw(other) {
      const [a, b] = [Math.min(number, other), Math.max(number, other)];
      const pair = await report.load(`pair-${a}-${b}`);
      const index = pair.modules.indexOf(name);
      if (!pair.gridded.includes(index)) {
        area.replaceChildren(make("p", { class: "soft" }, index < 0 ? "The other adapter does not have this module." : "This module is among those whose grid was left out."));
        return;
      }
      await report.phi(area, { a, b, index, names: [names[a - 1], names[b - 1]] }, state, (where) => keep({ with: other, ...where }));
    }
    await draw(chosen);
  }

  function keep(more) {
    state = { ...state, ...more };
    report.remember(state);
  }

  function open(index) {
    keep({ module: modules[index].name });
    show(index, true).catch((error) => report.failed(panel, error));
  }

  function close() {
    panel.hidden = true;
    report.remember({});
    const cell = mapped.querySelector("[aria-current]");
    state = {};
    report.map.mark(mapped, null);
    cell?.focus();
  }

  function follow(focus) {
    const wanted = report.place();
    const index = modules.findIndex((m) => m.name === wanted.module);
    if (index < 0) return;
    state = wanted;
    show(index, focus).catch((error) => report.failed(panel, error));
  }

  report.map(mapped, data, open);
  addEventListener("hashchange", () => follow(true));
  follow(true);
})().catch((error) => report.failed(document.getElementById("map"), error));
