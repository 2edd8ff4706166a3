"use strict";
// All adapters: the matrix of cosines in any order, the tree beside it, and what all have in common.
(async () => {
  const { make } = report;
  const element = document.getElementById("matrix");
  const data = await report.load("atlas");
  const count = data.names.length;

  function cosine(a, b) {
    if (a === b) return 1;
    const [low, high] = [Math.min(a, b), Math.max(a, b)];
    const value = data.cosine[low * count - (low * (low + 1)) / 2 + high - low - 1];
    return value === null ? null : value * data.unit;
  }

  const orders = {
    tree: () => data.order,
    name: () => indices().sort((a, b) => data.names[a].localeCompare(data.names[b], "en", { numeric: true })),
    norm: () => indices().sort((a, b) => data.norm[b] - data.norm[a]),
    start: () => indices().sort((a, b) => data.start[a] - data.start[b] || a - b),
  };

  function indices() {
    return data.names.map((_, i) => i);
  }

  /** The tree as lines: the leaves are at 0, 1, … in its order, a join at the distance 1 - cosine. */
  function tree() {
    const at = new Map(data.order.map((leaf, position) => [leaf, { y: position, x: 0 }]));
    const [x, y] = [[], []];
    data.linkage.forEach(([first, second, distance], join) => {
      const [a, b] = [at.get(first), at.get(second)];
      x.push(a.x, distance, distance, b.x, null);
      y.push(a.y, a.y, b.y, b.y, null);
      at.set(count + join, { y: (a.y + b.y) / 2, x: distance });
    });
    return { x, y };
  }

  const least = data.cosine.reduce((low, value) => Math.min(low, value ?? 0), 0) * data.unit;
  const chart = make("div", { class: "chart", role: "img", "aria-label": `Cosines of ${count} adapters with each other; the tables below have the numbers.` });
  let current = "tree";

  function draw() {
    const order = orders[current]();
    const names = order.map((i) => data.names[i]);
    const places = names.map((_, i) => i);
    const withTree = current === "tree" && count > 1;
    const few = count <= 40;
    const cut = (name) => (name.length > 34 ? `…${name.slice(-33)}` : name);
    const narrow = element.clientWidth < 600;
    const labels = few && !narrow ? { tickvals: places, ticktext: names.map((name) => report.literal(cut(name))), ticks: "" } : { showticklabels: false, ticks: "" };
    const traces = [
      {
        type: "heatmap", z: order.map((a) => order.map((b) => cosine(a, b))), x: places, y: places, zmin: least, zmax: 1, colorscale: report.SCALE, showscale: false,
        text: count <= 150 ? order.map((a) => order.map((b) => `${report.literal(data.names[a])}<br>${report.literal(data.names[b])}`)) : undefined,
        hovertemplate: count <= 150 ? "%{text}<br>cosine %{z:.3g}<extra></extra>" : "cosine %{z:.3g}<extra></extra>",
      },
    ];
    if (withTree) {
      traces.push({ ...tree(), xaxis: "x2", mode: "lines", line: { color: report.ink("ink"), width: 1 }, hoverinfo: "skip", showlegend: false });
    }
    const side = Math.min(element.clientWidth, 900);
    chart.style.height = `${Math.max(320, few ? Math.max(side * 0.6, 24 * count + 160) : side * 0.8)}px`;
    return report.draw(
      chart, traces,
      {
        margin: { l: 10, r: 10, t: 25, b: few && !narrow ? 10 : 45 },
        xaxis: { domain: [withTree ? 0.24 : 0, 1], tickangle: -60, showgrid: false, showline: false, range: [-0.5, count - 0.5], ...labels },
        xaxis2: { domain: [0, 0.2], autorange: "reversed", title: { text: "1 − cosine" }, showgrid: false, zeroline: false, nticks: 3, tickangle: 0 },
        yaxis: { range: [count - 0.5, -0.5], showgrid: false, side: "right", showline: false, ...labels },
        showlegend: false,
      },
      draw,
    );
  }

  element.replaceChildren(
    report.choice("Order", [["tree", "likest side by side"], ["name", "name"], ["norm", "‖ΔW‖"], ["start", "start"]], current, (value) => { current = value; draw(); }),
    chart,
    report.bar({ low: least, high: 1, log: false, kind: "number", from: Math.max(least, -2 * data.chance_sd), to: 2 * data.chance_sd, word: "chance, ± 2 sd", label: "cosine" }),
    make("p", { class: "soft" }, `The mean update holds ${report.share(data.mean_share)} of the mean energy; ${report.share(1 / count)} by chance. Starts and common directions are told by ${data.sampled} module${data.sampled > 1 ? "s" : ""}.`),
  );
  report.table(document.getElementById("atlas-adapters"), data.adapters, {
    caption: "adapters",
    link: (i, column) => {
      const to = column === "adapter" ? data.adapters.pages[i] : data.names.indexOf(data.adapters.rows[i][data.adapters.columns.findIndex((c) => c.key === "nearest")]) + 1;
      return to ? `adapters/${to}.html` : null;
    },
  });
  report.table(document.getElementById("atlas-pairs"), data.pairs, { caption: "pairs by cosine" });
  report.table(document.getElementById("atlas-growth"), data.growth, { caption: "directions that all share" });

  function growth() {
    const { columns, rows } = data.growth;
    const at = Object.fromEntries(columns.map((c, i) => [c.key, i]));
    const groups = [...new Set(rows.map((row) => `${row[at.side]}, ${row[at.adapters]}`))];
    const traces = groups.flatMap((group, number) => {
      const mine = rows.filter((row) => `${row[at.side]}, ${row[at.adapters]}` === group);
      const line = { color: report.SERIES[number % 7] };
      const x = mine.map((row) => row[at.count]);
      return [
        { x, y: mine.map((row) => row[at.k90]), mode: "lines+markers", name: group, line, marker: { symbol: report.MARKERS[number % 7] } },
        { x, y: mine.map((row) => row[at.k90_chance]), mode: "lines", name: `${group}: chance`, line: { ...line, dash: "dash" } },
      ];
    });
    return report.draw(chartOfGrowth, traces, { xaxis: { title: { text: "adapters" }, type: "log", tickvals: [...new Set(rows.map((row) => row[at.count]))] }, yaxis: { title: { text: "directions that hold 90 %" }, rangemode: "tozero" } }, growth);
  }

  const chartOfGrowth = make("div", { class: "chart", role: "img", "aria-label": "Directions that hold 90 % of the energy by number of adapters, beside chance; the table below has the numbers." });
  document.getElementById("growth-chart").replaceChildren(chartOfGrowth);
  await draw();
  await growth();
})().catch((error) => report.failed(document.getElementById("matrix"), error));
