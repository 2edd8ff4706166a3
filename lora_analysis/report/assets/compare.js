"use strict";
// Two adapters side by side: which pair, which module, φ(i, j), and their tables.
(async () => {
  const { make } = report;
  const element = document.getElementById("grid");
  const { names, pairs: every, table } = await report.pairsOf(null);
  const differs = table.columns.findIndex((c) => c.key === "kind");
  const kinds = [...new Set(table.rows.map((row) => row[differs]))];
  let state = {};
  let pairs = every;

  function address(i) {
    return `#${new URLSearchParams({ a: every[i][0], b: every[i][1] })}`;
  }

  function keep(more) {
    state = { ...state, ...more };
    report.remember(state);
  }

  async function show() {
    pairs = every.filter((_, i) => !kinds.includes(state.kind) || table.rows[i][differs] === state.kind);
    const wanted = pairs.findIndex(([a, b]) => a === Number(state.a) && b === Number(state.b));
    const at = Math.max(0, wanted);
    const [a, b] = pairs[at];
    const pair = await report.load(`pair-${a}-${b}`);
    const known = pair.gridded.map((i) => pair.modules[i]);
    const module = known.includes(state.module) ? state.module : known[Math.floor((known.length - 1) / 2)];
    const called = [names[a - 1], names[b - 1]];
    const kind = table.rows[every.indexOf(pairs[at])][differs];
    const words = { r: "ranks", seed: "seeds", task: "tasks", targets: "targets", "seed or task": "seeds or tasks" };
    const area = make("div");
    const partners = (of) => pairs.flatMap(([x, y]) => (x === of ? [y] : []));
    element.replaceChildren(
      ...(kinds.length > 1 ? [report.choice("Compare", [["all", "all"], ...kinds.map((one) => [one, words[one]])], kinds.includes(state.kind) ? state.kind : "all", (value) => choose({ kind: value }))] : []),
      make(
        "div",
        { class: "controls" },
        report.select("A", [...new Set(pairs.map(([x]) => x))].map((x) => [x, names[x - 1]]), a, (value) => choose({ a: value, b: partners(Number(value)).includes(b) ? b : partners(Number(value))[0] })),
        report.select("B", partners(a).map((y) => [y, names[y - 1]]), b, (value) => choose({ b: value })),
        report.select("module", known.map((name) => [name, name]), module, (value) => choose({ module: value })),
      ),
      make("p", { class: "soft" }, `These differ in: ${kind}. ${pair.gridded.length} of ${pair.modules.length} modules have grids; q counts them together, cell by cell.`),
      ...pair.notes.map((note) => make("p", { class: "note" }, note)),
      area,
    );
    const index = pair.modules.indexOf(module);
    report.table(document.getElementById("same-table"), pair.same, { caption: "sameness by module", link: (i) => link(pair, "same", i) });
    report.table(document.getElementById("merge-table"), pair.merge, { caption: "interference by module", link: (i) => link(pair, "merge", i) });
    await report.phi(area, { a, b, index, names: called }, state, (where) => keep({ ...(state.kind ? { kind: state.kind } : {}), a, b, module, ...where }));

    function link(data, name, i) {
      const shown = data[name].rows[i][0];
      return known.includes(shown) ? `#${new URLSearchParams({ a, b, module: shown })}` : null;
    }
  }

  function choose(more) {
    keep(more);
    show().catch((error) => report.failed(element, error));
  }

  addEventListener("hashchange", () => {
    state = report.place();
    choose({});
    element.scrollIntoView({ block: "start" });
  });
  state = report.place();
  report.table(document.getElementById("pairs-table"), table, { caption: "pairs", link: address });
  await show();
})().catch((error) => report.failed(document.getElementById("grid"), error));
