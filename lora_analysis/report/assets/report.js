"use strict";
// What every page needs: data asked for when it is wanted, the theme, colours with a bar, numbers, charts.
// Text out of files is only ever set as text.
const report = (() => {
  const page = document.documentElement;
  const arrived = new Map();
  const asked = new Map();

  function script(path) {
    return new Promise((done, failed) => {
      const element = document.createElement("script");
      element.src = page.dataset.root + path;
      element.onload = done;
      element.onerror = () => failed(new Error(`${path} is not there.`));
      document.head.append(element);
    });
  }

  /** The value that data/NAME.js holds; each file is read once. */
  function load(name) {
    if (!asked.has(name)) asked.set(name, script(`data/${name}.js`).then(() => arrived.get(name)));
    return asked.get(name);
  }

  function receive(name, value) {
    arrived.set(name, value);
  }

  /** An element with attributes and children, which are elements or text. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") for (const [event, listener] of Object.entries(value)) element.addEventListener(event, listener);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  /** A name that may break after its dots and slashes. */
  function breakable(name) {
    return name.split(/(?<=[./])/).flatMap((part, i) => (i ? [document.createElement("wbr"), part] : [part]));
  }

  /** Say in the page what went wrong, and in the console. */
  function failed(element, error) {
    element.replaceChildren(make("p", { class: "note" }, `This part could not be shown: ${error.message}`));
    console.error(error);
  }

  // Numbers

  function figure(value, digits = 3) {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    if (value !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(digits - 1);
    if (Number.isInteger(value)) return String(value);
    return String(Number(value.toPrecision(digits)));
  }

  function share(value) {
    return value === null || value === undefined ? "–" : `${figure(100 * value)} %`;
  }

  function probability(value) {
    if (value === null || value === undefined) return "–";
    return value >= 0.0005 ? value.toFixed(3) : value.toExponential(0);
  }

  /** A whole number with commas between thousands. */
  function count(value) {
    return Number.isInteger(value) ? value.toLocaleString("en-US") : figure(value);
  }

  const write = { number: figure, fine: (value) => figure(value, 4), count, share, p: probability, q: probability };

  /** A value as its column says, a dash where it is missing. */
  function written(value, kind) {
    if (value === null || value === undefined) return "–";
    return write[kind] ? write[kind](value) : String(value);
  }

  // Colours: cividis, perceptually uniform and the same to eyes that see no red or green.

  const CIVIDIS = [
    "00224e", "002e6a", "1a386f", "32436d", "434e6c", "535a6d", "61656f", "6f7073", "7d7c78",
    "8c8878", "9b9476", "aba072", "bcae6c", "cdbb63", "dec958", "f0d846", "fee838",
  ].map((hex) => [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16)));

  function rgb(at) {
    const place = Math.min(1, Math.max(0, at)) * (CIVIDIS.length - 1);
    const below = Math.min(Math.floor(place), CIVIDIS.length - 2);
    return CIVIDIS[below].map((value, i) => Math.round(value + (place - below) * (CIVIDIS[below + 1][i] - value)));
  }

  function colour(at) {
    return `rgb(${rgb(at).join(" ")})`;
  }

  /** Black or white, whichever is read better on the colour. */
  function inkOn(at) {
    const [r, g, b] = rgb(at).map((value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000000" : "#ffffff";
  }

  /** Where a value lies between low and high, from 0 to 1. */
  function placing(low, high, log) {
    if (low === high) return () => 0.5;
    if (log) return (value) => (Math.log(value) - Math.log(low)) / (Math.log(high) - Math.log(low));
    return (value) => (value - low) / (high - low);
  }

  /** A colour bar; chance is marked on it, from one value to another. */
  function bar({ low, high, log, kind, from = null, to = null, word = "chance", label = "" }) {
    const place = placing(low, high, log);
    const stops = [...Array(17).keys()].map((i) => colour(i / 16)).join(", ");
    const strip = make("div", { class: "strip", style: `background: linear-gradient(to right, ${stops})` });
    let said = "";
    if (from !== null) {
      const [start, end] = [place(from), place(to)].map((at) => 100 * Math.min(1, Math.max(0, at)));
      const wide = end - start > 1.5;
      strip.append(make("div", { class: wide ? "mark wide" : "mark", style: `left: ${start}%; width: ${end - start}%` }));
      const span = from === to || written(from, kind) === written(to, kind) ? written(from, kind) : `${written(from, kind)} to ${written(to, kind)}`;
      const off = to < low ? ", below this bar" : from > high ? ", above this bar" : "";
      said = `▮ ${word}: ${span}${off}`;
    }
    return make(
      "div",
      { class: "bar" },
      make("div", { "aria-hidden": "true" }, strip, make("div", { class: "ends" }, make("span", {}, written(low, kind)), make("span", {}, label + (log ? " (log)" : "")), make("span", {}, written(high, kind)))),
      make("p", { class: "said" }, said || "no chance level"),
    );
  }

  /** A group of radio buttons that look like one switch. */
  function choice(legend, options, chosen, change) {
    const group = `choice-${document.querySelectorAll("fieldset").length}-${legend.replace(/\W/g, "")}`;
    return make(
      "fieldset",
      { class: "choice" },
      make("legend", {}, legend),
      ...options.map(([value, label]) =>
        make("label", {}, make("input", { type: "radio", name: group, value, checked: value === chosen, on: { change: () => change(value) } }), label),
      ),
    );
  }

  function select(label, options, chosen, change) {
    const element = make(
      "select",
      { on: { change: () => change(element.value) } },
      ...options.map(([value, text]) => make("option", { value, selected: String(value) === String(chosen) }, text)),
    );
    return make("label", {}, make("span", {}, label), element);
  }

  // Permalinks: what is shown is in the address, after the #.

  function place() {
    return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  }

  function remember(state) {
    history.replaceState(null, "", `#${new URLSearchParams(state)}`);
  }

  function download(name, type, text) {
    const link = make("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  // Theme

  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");

  function dark() {
    return page.dataset.theme ? page.dataset.theme === "dark" : system.matches;
  }

  function themed() {
    button.textContent = dark() ? "Light theme" : "Dark theme";
    for (const again of charts.values()) again();
  }

  const charts = new Map();
  button.addEventListener("click", () => {
    page.dataset.theme = dark() ? "light" : "dark";
    try {
      localStorage.setItem("theme", page.dataset.theme);
    } catch {
      // Then the next page asks the system again.
    }
    themed();
  });
  system.addEventListener("change", themed);

  // Charts: plotly is read when the first one is drawn.

  let plotly = null;

  async function draw(element, traces, layout, redraw) {
    plotly ??= script("assets/plotly.min.js");
    await plotly;
    if (!element.isConnected) return;
    const style = getComputedStyle(page);
    const ink = style.getPropertyValue("--ink");
    const axis = { gridcolor: style.getPropertyValue("--line"), zeroline: false, linecolor: style.getPropertyValue("--soft"), ticks: "outside", tickcolor: style.getPropertyValue("--soft"), automargin: true };
    const merged = {
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: ink, family: "system-ui, sans-serif", size: 12 },
      margin: { l: 55, r: 12, t: 12, b: 45 },
      hoverlabel: { bgcolor: style.getPropertyValue("--panel"), font: { color: ink } },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      ...layout,
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
    };
    await Plotly.react(element, traces, merged, { displayModeBar: false, responsive: true });
    if (redraw) charts.set(element, () => element.isConnected && redraw());
    for (const known of charts.keys()) if (!known.isConnected) charts.delete(known);
  }

  /** A name as a chart shows it: plotly reads markup in its labels. */
  function literal(name) {
    return name.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
  }

  function ink(name) {
    return getComputedStyle(page).getPropertyValue(`--${name}`);
  }

  const SCALE = CIVIDIS.map((_, i) => [i / (CIVIDIS.length - 1), colour(i / (CIVIDIS.length - 1))]);
  const SERIES = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c3c"];
  const MARKERS = ["circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x"];

  // Print is light and has nothing folded, whatever the screen is.
  let before = null;
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    for (const one of folded) one.open = true;
    before = page.dataset.theme ?? "";
    page.dataset.theme = "light";
    themed();
  });
  addEventListener("afterprint", () => {
    for (const one of folded) one.open = false;
    if (before) page.dataset.theme = before;
    else delete page.dataset.theme;
    themed();
  });

  button.textContent = dark() ? "Light theme" : "Dark theme";
  return { MARKERS, SCALE, SERIES, bar, breakable, choice, colour, download, draw, failed, figure, ink, ink, inkOn, literal, load, make, place, placing, probability, receive, remember, select, share, written };
})();
