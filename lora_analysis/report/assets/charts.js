"use strict";
// The charts of one module: its spectrum against chance and the noise floor, and amplification over k.
report.spectrum = (element, module, bands, name) => {
  const S = module.S;
  if (!S || !S.length || !(S[0] > 0)) {
    element.replaceChildren(report.make("p", { class: "soft" }, "No spectrum: ΔW is zero, not finite, or of unknown scale."));
    return;
  }
  const norm = Math.hypot(...S);
  const k = S.map((_, i) => i + 1);
  const shares = S.map((value) => value / norm);
  const floors = module.floors?.map((value) => (3 * value) / norm);
  const below = shares.map((value, i) => Boolean(floors) && value < floors[i]);
  const band = module.band ? bands[module.band] : null;
  const shown = Math.max(...shares) / 1e7;
  const draw = () => {
    const traces = [];
    if (band) {
      const x = band[0].map((_, i) => i + 1);
      const line = { width: 0 };
      traces.push(
        { x, y: band[0], mode: "lines", line, hoverinfo: "skip", showlegend: false },
        { x, y: band[2], mode: "lines", line, fill: "tonexty", fillcolor: report.ink("band"), name: "chance, 90 % band", hoverinfo: "skip" },
        { x, y: band[1], mode: "lines", line: { color: report.ink("chance"), dash: "dash", width: 1 }, name: "chance, median" },
      );
    }
    traces.push({
      x: k, y: shares, mode: "lines+markers", name: "σ of ΔW", line: { color: report.SERIES[0], width: 1.5 },
      marker: { size: 7, color: below.map((low) => (low ? report.ink("paper") : report.SERIES[0])), line: { color: report.SERIES[0], width: 1.5 } },
      customdata: S.map((value, i) => [report.figure(value, 4), report.figure(module.errors?.[i])]),
      hovertemplate: "k = %{x}<br>σ = %{customdata[0]}<br>error of a cut here: %{customdata[1]}<extra></extra>",
    });
    if (floors?.some((value) => value > shares.at(-1) / 100)) {
      traces.push({ x: k, y: floors, mode: "lines", name: "3 × storage noise", line: { color: report.SERIES[1], dash: "dot", width: 1.5 } });
    }
    const least = Math.max(shown, Math.min(...shares, ...(band ? band[0] : [])));
    return report.draw(
      element, traces,
      { xaxis: { title: { text: "k" }, dtick: k.length > 16 ? undefined : 1 }, yaxis: { title: { text: "σₖ / ‖ΔW‖" }, type: "log", range: [Math.log10(least) - 0.15, 0.1], dtick: "D2" } },
      draw,
    );
  };
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", `Singular values of ${name}: the first holds ${report.share(shares[0] ** 2)} of ‖ΔW‖², ${below.filter(Boolean).length} of ${S.length} lie below three storage-noise floors.`);
  return draw();
};

report.amplification = (element, rows, name) => {
  const known = rows.filter((row) => row.gain !== null);
  if (!known.length) {
    element.replaceChildren(report.make("p", { class: "soft" }, "No gain: ΔW has no directions to project W on."));
    return;
  }
  const x = known.map((row) => row.k);
  const draw = () => {
    const found = known.map((row) => row.q !== null && row.q <= 0.05);
    const traces = [
      {
        x, y: known.map((row) => row.gain), mode: "lines+markers", name: "gain", line: { color: report.SERIES[0] },
        marker: { size: 9, color: found.map((yes) => (yes ? report.SERIES[0] : report.ink("panel"))), line: { color: report.SERIES[0], width: 1.5 } },
        customdata: known.map((row) => [report.probability(row.p), report.probability(row.q), report.share(row.ceiling_fraction)]),
        hovertemplate: "k = %{x}<br>gain %{y:.3g}, chance 1<br>p %{customdata[0]}, q %{customdata[1]}<br>%{customdata[2]} of the ceiling<extra></extra>",
      },
      { x: [x[0], x.at(-1)], y: [1, 1], mode: "lines", name: "chance", line: { color: report.ink("chance"), dash: "dash" }, hoverinfo: "skip" },
    ];
    for (const [key, label, symbol, dash] of [["amplification", "factor", "square", "solid"], ["amplification_null", "factor by chance", "square-open", "dot"]]) {
      traces.push({ x, y: known.map((row) => row[key]), yaxis: "y2", mode: "lines+markers", name: label, line: { color: report.SERIES[1], dash, width: 1 }, marker: { symbol, size: 6 }, hovertemplate: `k = %{x}<br>${label} %{y:.3g}<extra></extra>` });
    }
    return report.draw(
      element, traces,
      {
        margin: { l: 55, r: 60, t: 12, b: 45 },
        xaxis: { title: { text: "k" }, type: "log", tickvals: x, ticktext: x.map(String) },
        yaxis: { title: { text: "gain" }, rangemode: "tozero" },
        yaxis2: { title: { text: "factor ‖ΔW‖ / ‖UᵀWV‖" }, overlaying: "y", side: "right", type: "log", dtick: "D2", showgrid: false },
      },
      draw,
    );
  };
  element.setAttribute("role", "img");
  element.setAttribute("aria-label", `Amplification of ${name}: ${known.map((row) => `gain ${report.figure(row.gain)} at k = ${row.k}`).join(", ")}; chance 1.`);
  return draw();
};
