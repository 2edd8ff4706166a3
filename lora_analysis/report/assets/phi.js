"use strict";
// φ(i, j) of one module of two adapters beside its chance, with sliders for i and j.
report.phi = (() => {
  const { make } = report;
  const CHANCE = 0.05;

  function slider(label, most, value, change) {
    const output = make("output", {}, String(value));
    const input = make("input", { type: "range", min: 1, max: most, step: 1, value, "aria-label": label, on: { input: () => { output.textContent = input.value; change(Number(input.value)); } } });
    return { row: make("div", { class: "slider" }, make("span", {}, label), input, output), set: (to) => { input.value = to; output.textContent = String(to); } };
  }

  function told(grid, i, j) {
    const at = (i - 1) * grid.n + (j - 1);
    const [phi, p, q] = [grid.phi[at], grid.p[at], grid.q[at]];
    const chance = grid.chance[Math.max(i, j) - 1];
    if (phi === null) return { chance, text: `φ(${i}, ${j}) is not defined: beyond the numerical rank.` };
    const verdict = q === null ? "not tested" : q > CHANCE ? "consistent with chance" : "beyond chance";
    const numbers = `φ(${i}, ${j}) = ${report.figure(phi)}, chance ${report.figure(chance)} ± ${report.figure(grid.sd[at], 2)}`;
    return { chance, text: `${numbers}; p ${report.probability(p)}, q ${report.probability(q)}: ${verdict}.` };
  }

  function heat(grid, values, name, top) {
    const rows = (list) => Array.from({ length: grid.m }, (_, i) => list.slice(i * grid.n, (i + 1) * grid.n));
    return {
      type: "heatmap", name, z: rows(values), x: Array.from({ length: grid.n }, (_, j) => j + 1), y: Array.from({ length: grid.m }, (_, i) => i + 1),
      zmin: 0, zmax: top, colorscale: report.SCALE, showscale: false, hoverongaps: false,
      customdata: rows(grid.phi.map((_, at) => [report.figure(grid.chance[Math.max(Math.floor(at / grid.n), at % grid.n)]), report.probability(grid.p[at]), report.probability(grid.q[at])])),
      hovertemplate: `i = %{y}, j = %{x}<br>${name} %{z:.3g}<br>chance %{customdata[0]}<br>p %{customdata[1]}, q %{customdata[2]}<extra></extra>`,
    };
  }

  /**
   * Show the grid of module number `index` of the pair a < b in an element.
   * state has side, i and j, and is kept by changed(state).
   */
  return async function phi(element, { a, b, index, names }, state, changed = () => {}) {
    const data = await report.load(`phi-${a}-${b}-${index}`);
    const sides = Object.keys(data.sides);
    let side = sides.includes(state.side) ? state.side : sides[0];
    let hide = false;
    let stretch = false;
    const top = () => (stretch ? Math.max(...grid.phi.filter((value) => value !== null), 1e-6) : 1);
    let grid = data.sides[side];
    let [i, j] = [Number(state.i) || 1, Number(state.j) || 1];
    const readout = make("p", { class: "readout", role: "status" });
    const bar = make("div");
    const plots = [make("div", { class: "chart", role: "img" }), make("div", { class: "chart", role: "img" })];
    const sliders = make("div");
    let [one, other] = [null, null];

    function marked() {
      return { shapes: [{ type: "rect", x0: j - 0.5, x1: j + 0.5, y0: i - 0.5, y1: i + 0.5, line: { color: "#ffffff", width: 4 } }, { type: "rect", x0: j - 0.5, x1: j + 0.5, y0: i - 0.5, y1: i + 0.5, line: { color: "#000000", width: 1.5 } }] };
    }

    function point() {
      const { chance, text } = told(grid, i, j);
      readout.textContent = text;
      bar.replaceChildren(report.bar({ low: 0, high: top(), log: false, kind: "number", from: chance, to: chance, word: `chance at (${i}, ${j})`, label: "φ" }));
      plots[0].setAttribute("aria-label", `Grid of φ(i, j), ${grid.m} by ${grid.n}. ${text}`);
      plots[1].setAttribute("aria-label", `What chance gives for φ(i, j): ${report.figure(chance)} at i = ${i}, j = ${j}.`);
      for (const plot of plots) if (plot.data) Plotly.relayout(plot, marked());
      changed({ side, i, j });
    }

    async function draw() {
      const shown = grid.phi.map((value, at) => (hide && grid.q[at] > CHANCE ? null : value));
      const chance = grid.phi.map((_, at) => grid.chance[Math.max(Math.floor(at / grid.n), at % grid.n)]);
      const axis = (title, most) => ({ title: { text: title }, dtick: most <= 16 ? 1 : undefined, range: [0.5, most + 0.5], showgrid: false });
      const layout = (title) => ({
        title: { text: title, font: { size: 13 }, x: 0.5, y: 0.98 }, margin: { l: 50, r: 8, t: 30, b: 45 },
        xaxis: axis("j", grid.n), yaxis: { ...axis("i", grid.m), range: [grid.m + 0.5, 0.5] }, ...marked(),
      });
      for (const plot of plots) plot.style.minHeight = `${Math.min(19, Math.max(9, 4 + 3 * grid.m))}rem`;
      await report.draw(plots[0], [heat(grid, shown, "φ", top())], layout("φ(i, j)"), draw);
      await report.draw(plots[1], [heat(grid, chance, "chance", top())], layout("chance, max(i, j) / d"));
      for (const plot of plots) {
        plot.removeAllListeners?.("plotly_click");
        plot.on?.("plotly_click", ({ points }) => move(points[0].y, points[0].x));
      }
    }

    function move(row, column) {
      [i, j] = [row, column];
      one.set(i);
      other.set(j);
      point();
    }

    function build() {
      grid = data.sides[side];
      [i, j] = [Math.min(i, grid.m), Math.min(j, grid.n)];
      one = slider(`i, first directions of ${names[0]}`, grid.m, i, (value) => { i = value; point(); });
      other = slider(`j, first directions of ${names[1]}`, grid.n, j, (value) => { j = value; point(); });
      sliders.replaceChildren(one.row, other.row);
      point();
      return draw();
    }

    const hiding = make("input", { type: "checkbox", on: { change: () => { hide = hiding.checked; draw(); } } });
    const stretching = make("input", { type: "checkbox", on: { change: () => { stretch = stretching.checked; point(); draw(); } } });
    element.replaceChildren(
      make(
        "div",
        { class: "controls" },
        report.choice("Side", sides.map((s) => [s, s === "in" ? "in (what ΔW reads)" : "out (what it writes)"]), side, (value) => { side = value; build(); }),
        make("label", {}, hiding, "leave out cells consistent with chance"),
        make("label", {}, stretching, "colours up to the largest φ"),
      ),
      sliders,
      readout,
      make("div", { class: "grids" }, ...plots),
      bar,
      ...(grid.flags.length ? [make("p", { class: "soft" }, `Flags of some cells: ${grid.flags.join(", ")}.`)] : []),
    );
    await build();
  };
})();

/** The pairs of a report as [a, b] by number, and what the page calls each adapter. */
report.pairsOf = async (number) => {
  const data = await report.load("pairs");
  const pairs = data.pairs.filter(([a, b]) => number === null || a === number || b === number);
  return { names: data.names, pairs, table: data };
};
