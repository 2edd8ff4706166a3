"use strict";
// A study: its metric against r with a point for every run, the claims, and the paper's tables.
(async () => {
  const { make } = report;
  const data = await report.load("ablation");
  document.getElementById("about").replaceChildren(make("p", {}, `Task ${data.task}, ${data.runs} finished runs. Points are runs; bars are the mean of equal seeds with the ${Math.round(100 * data.confidence)} % interval of its gain over the frozen model, over seeds and groups of held-out items.`));
  const element = document.getElementById("metric");
  const chart = make("div", { class: "chart", role: "img" });
  let current = data.metrics[0];

  function draw() {
    const factor = current.metric === "accuracy" ? 100 : 1;
    const scaled = (value) => (value === null ? null : factor * value);
    const title = current.metric === "accuracy" ? "accuracy (%)" : "held-out loss (nats)";
    const ranks = [...new Set(current.series.flatMap((one) => one.bars.map((bar) => bar.r)))].sort((a, b) => a - b);
    const traces = current.series.flatMap((one, number) => {
      const colour = report.SERIES[number % 7];
      // Shifted by a hair, so that points of one r stay apart.
      const apart = Math.min(0.14, 0.6 / current.series.length);
      const shift = 2 ** (apart * (number - (current.series.length - 1) / 2));
      const name = report.literal(one.targets);
      const bars = one.bars;
      return [
        {
          x: bars.map((bar) => bar.r * shift), y: bars.map((bar) => scaled(bar.mean)), mode: "lines+markers", name, legendgroup: name, line: { color: colour, width: 1.5 },
          marker: { symbol: `${report.MARKERS[number % 7]}-open`, size: 11, color: colour },
          error_y: { type: "data", symmetric: false, array: bars.map((bar) => (bar.high === null ? 0 : scaled(bar.high - bar.mean))), arrayminus: bars.map((bar) => (bar.low === null ? 0 : scaled(bar.mean - bar.low))), color: colour, thickness: 1 },
          customdata: bars.map((bar) => [bar.r, report.figure(scaled(bar.low), 4), report.figure(scaled(bar.high), 4)]),
          hovertemplate: "%{fullData.name}, r = %{customdata[0]}<br>mean %{y:.4g}, %{customdata[1]} to %{customdata[2]}<extra></extra>",
        },
        {
          x: one.points.map((point) => point[0] * shift), y: one.points.map((point) => scaled(point[3])), mode: "markers", legendgroup: name, showlegend: false,
          marker: { color: colour, symbol: report.MARKERS[number % 7], size: 5 },
          customdata: one.points.map(([r, init, order]) => [r, init, order]), name,
          hovertemplate: "%{fullData.name}, r = %{customdata[0]}<br>seed %{customdata[1]}, order %{customdata[2]}: %{y:.4g}<extra></extra>",
        },
      ];
    });
    if (current.frozen !== null) {
      const ends = [ranks[0] * 0.8, ranks.at(-1) * 1.25];
      traces.push({ x: ends, y: [scaled(current.frozen), scaled(current.frozen)], mode: "lines", name: "frozen model", line: { color: report.ink("chance"), dash: "dash" } });
    }
    chart.setAttribute("aria-label", `${title} against r: ${current.series.map((one) => `${one.targets} ${one.bars.map((bar) => `${report.figure(scaled(bar.mean))} at r = ${bar.r}`).join(", ")}`).join("; ")}; frozen model ${report.figure(scaled(current.frozen))}. The tables below have the numbers.`);
    return report.draw(chart, traces, { xaxis: { title: { text: "r" }, type: "log", tickvals: ranks, ticktext: ranks.map(String) }, yaxis: { title: { text: title } } }, draw);
  }

  if (current) {
    element.replaceChildren(report.choice("Metric", data.metrics.map((m) => [m.metric, m.metric]), current.metric, (value) => { current = data.metrics.find((m) => m.metric === value); draw(); }), chart);
    await draw();
  } else element.replaceChildren(make("p", { class: "note" }, "No run of LoRA has finished."));

  const claims = document.getElementById("claims");
  if (data.claims) report.table(claims, data.claims, { caption: "claims" });
  else claims.replaceChildren(make("p", { class: "soft" }, "No claims were judged: ablate does it when its runs have finished."));
  const tables = document.getElementById("tables");
  for (const table of data.tables) {
    const area = make("div");
    tables.append(make("h3", {}, table.title), area);
    report.table(area, table, { caption: table.title });
  }
  if (!data.tables.length) tables.append(make("p", { class: "soft" }, "None can be made of these runs."));
})().catch((error) => report.failed(document.getElementById("about"), error));
