"use strict";
// The map of layers and projections: a table of buttons, coloured by one number of each module.
report.map = (() => {
  const { make, written } = report;

  function heading(kind) {
    const parts = /^(ΔW)_(.+)$/.exec(kind);
    return parts ? make("span", {}, parts[1], make("sub", {}, parts[2])) : make("span", {}, ...report.breakable(kind));
  }

  function range(metric) {
    const known = (values) => (values ?? []).filter((value) => value !== null && (!metric.log || value > 0));
    const values = known(metric.values);
    const [lows, highs] = [known(metric.low), known(metric.high)];
    const from = lows.length ? Math.min(...lows) : null;
    const to = highs.length ? Math.max(...highs) : null;
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const wide = [Math.min(low, from ?? low), Math.max(high, to ?? high)];
    // Chance is within the bar unless the values would then share less than half of the colours.
    const size = ([a, b]) => (metric.log ? Math.log(b) - Math.log(a) : b - a);
    const [least, most] = size(wide) <= 2 * size([low, high]) || low === high ? wide : [low, high];
    return { low: least, high: most, from, to, log: metric.log };
  }

  function button(module, index, metric, span, open, withName) {
    const value = metric.values[index];
    const plain = metric.plain?.[index];
    const text = written(value, metric.kind) + (plain ? " ∘" : "");
    const where = module.layer === null ? module.name : `${module.name}, layer ${module.layer}`;
    const said = `${where}: ${metric.label} ${written(value, metric.kind)}${plain ? `, ${metric.plain_word}` : ""}`;
    const at = value === null || (span.log && value <= 0) ? null : report.placing(span.low, span.high, span.log)(value);
    return make(
      "button",
      {
        type: "button",
        class: at === null ? "cell empty" : "cell",
        style: at === null ? null : `background: ${report.colour(at)}; color: ${report.inkOn(at)}`,
        "aria-label": said,
        title: said,
        "data-index": index,
        on: { click: () => open(index) },
      },
      ...(withName ? [module.name, make("br")] : []),
      text,
    );
  }

  function grid(modules, metric, span, open) {
    const kinds = [...new Set(modules.map((m) => m.kind))];
    const layers = [...new Set(modules.map((m) => m.layer))].sort((a, b) => (a ?? Infinity) - (b ?? Infinity));
    const at = new Map();
    modules.forEach((m, i) => {
      const key = `${m.layer}/${m.kind}`;
      at.set(key, [...(at.get(key) ?? []), i]);
    });
    const rows = layers.map((layer) =>
      make(
        "tr",
        {},
        make("th", { scope: "row" }, layer === null ? "–" : String(layer)),
        ...kinds.map((kind) => make("td", {}, ...(at.get(`${layer}/${kind}`) ?? []).map((i) => button(modules[i], i, metric, span, open, false)))),
      ),
    );
    return make(
      "table",
      { class: "map-table" },
      make("caption", { class: "visually-hidden" }, `${metric.label} by layer and projection`),
      make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "layer"), ...kinds.map((kind) => make("th", { scope: "col", title: kind }, heading(kind))))),
      make("tbody", {}, ...rows),
    );
  }

  /** Show the map of data in an element; open(index) is called with the module that is clicked. */
  return function map(element, data, open, chosen) {
    const { modules, metrics } = data;
    if (!metrics.length) {
      element.replaceChildren(make("p", { class: "note" }, "No module has a number to show: see the flags in the tables below."));
      return;
    }
    const about = make("div");
    const table = make("div", { class: "scroll" });
    let current = metrics.find((m) => m.key === chosen) ?? metrics[0];

    function show(key) {
      current = metrics.find((m) => m.key === key) ?? current;
      const span = range(current);
      const [rows, columns] = [new Set(modules.map((m) => m.layer)).size, new Set(modules.map((m) => m.kind)).size];
      // Without layers, or where few projections recur in several, a list is read better than a table of gaps.
      element.closest(".first")?.classList.toggle("broad", columns > 9);
      const flat = modules.every((m) => m.layer === null) || modules.length < (rows * columns) / 4;
      const cells = flat
        ? make("ul", { class: "flow", tabindex: "0", "aria-label": "Modules" }, ...modules.map((m, i) => make("li", {}, button(m, i, current, span, open, true))))
        : grid(modules, current, span, open);
      table.replaceChildren(cells);
      const note = current.plain?.some(Boolean) ? ` ∘ marks what is ${current.plain_word}.` : "";
      about.replaceChildren(make("p", { class: "soft" }, `${current.help}.${note}`), report.bar({ ...span, kind: current.kind, word: current.word, label: current.label }));
    }

    element.replaceChildren(report.choice("Colour by", metrics.map((m) => [m.key, m.label]), current.key, (key) => { show(key); map.mark(element, map.open); }), about, table);
    show(current.key);
  };
})();

/** Mark the module that is open. */
report.map.open = null;
report.map.mark = (element, index) => {
  report.map.open = index;
  for (const cell of element.querySelectorAll(".cell")) {
    if (index !== null && Number(cell.dataset.index) === index) cell.setAttribute("aria-current", "true");
    else cell.removeAttribute("aria-current");
  }
};
