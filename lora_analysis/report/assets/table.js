"use strict";
// Tables that sort, filter and download. Rows beyond the first two hundred are made when asked for.
report.table = (() => {
  const { make, written } = report;
  const ROWS = 200;
  const CHANCE = 0.05;
  const FOLDED = 200;
  const NUMERIC = new Set(["number", "fine", "count", "share", "p", "q"]);

  /** Whether a row has every word of the filter; a word such as gain>1.2 compares a column. */
  function matcher(text, columns) {
    const tests = text.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
      const parts = /^(.+?)(<=|>=|<|>|=)(-?[\d.]+(?:e-?\d+)?)$/.exec(word);
      const at = parts ? columns.findIndex((c) => [c.key, c.label].some((n) => n.toLowerCase().replace(/\s+/g, "_") === parts[1])) : -1;
      if (at < 0) return (row) => row.some((value) => String(value ?? "").toLowerCase().includes(word));
      const limit = Number(parts[3]);
      const holds = { "<": (x) => x < limit, ">": (x) => x > limit, "<=": (x) => x <= limit, ">=": (x) => x >= limit, "=": (x) => x === limit };
      return (row) => row[at] !== null && holds[parts[2]](row[at]);
    });
    return (row) => tests.every((test) => test(row));
  }

  function csv(columns, rows) {
    const quoted = (value) => {
      const text = value === null || value === undefined ? "" : String(value);
      return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    return [columns.map((c) => c.key), ...rows].map((row) => row.map(quoted).join(",") + "\n").join("");
  }

  function cell(value, column, href) {
    const shown = written(value, column.kind);
    const right = NUMERIC.has(column.kind);
    const long = !right && shown.length > 60;
    const td = make("td", { class: right ? "right" : column.kind === "name" ? "name" : long ? "long" : null });
    const text = column.kind === "name" ? report.breakable(shown) : [shown];
    if (!right && shown.length > FOLDED) {
      td.append(make("details", {}, make("summary", {}, `${shown.slice(0, 90)}…`), shown));
      return td;
    }
    td.append(...(href ? [make("a", { href }, ...text)] : text));
    if (column.kind === "q" && value !== null && value > CHANCE) td.append(make("span", { class: "plain" }, "consistent with chance"));
    return td;
  }

  /**
   * Show a table in an element.
   * options.link(index, column) gives the address that a name leads to; options.caption says what it is.
   */
  return function table(element, data, { link = () => null, caption = "" } = {}) {
    const { columns, rows } = data;
    let order = rows.map((_, i) => i);
    let sorted = { at: -1, down: false };
    let all = false;
    let matching = order;

    const filter = make("input", { type: "search", placeholder: "words, or column>number", on: { input: refresh } });
    const count = make("span", { class: "soft", role: "status" });
    const head = make("tr");
    const body = make("tbody");
    const more = make("button", { type: "button", class: "more", on: { click: () => { all = true; refresh(); } } });
    const frame = make(
      "div",
      { class: "framed", role: "region", tabindex: "0", "aria-label": `Table: ${caption || data.name}` },
      make("table", { class: "data" }, make("caption", { class: "visually-hidden" }, caption || data.name), make("thead", {}, head), body),
    );
    const heads = columns.map((column, at) => {
      const arrow = make("span", { class: "arrow", "aria-hidden": "true" });
      const th = make(
        "th",
        { scope: "col", class: NUMERIC.has(column.kind) ? "right" : null, "aria-sort": "none" },
        make("button", { type: "button", title: column.help || null, on: { click: () => sort(at) } }, column.label, arrow),
      );
      return { th, arrow };
    });
    head.append(...heads.map((one) => one.th));

    function sort(at) {
      // Numbers are first sorted by the largest, names by the first.
      const first = NUMERIC.has(columns[at].kind);
      sorted = { at, down: sorted.at === at ? !sorted.down : first };
      const sign = sorted.down ? -1 : 1;
      order = rows.map((_, i) => i).sort((a, b) => {
        const [x, y] = [rows[a][at], rows[b][at]];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        const by = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
        return sign * by || a - b;
      });
      heads.forEach(({ th, arrow }, i) => {
        th.setAttribute("aria-sort", i !== at ? "none" : sorted.down ? "descending" : "ascending");
        arrow.textContent = i !== at ? "" : sorted.down ? "↓" : "↑";
      });
      refresh();
    }

    function refresh() {
      const holds = matcher(filter.value, columns);
      matching = order.filter((i) => holds(rows[i]));
      const shown = all ? matching : matching.slice(0, ROWS);
      body.replaceChildren(
        ...shown.map((i) => make("tr", {}, ...columns.map((column, at) => cell(rows[i][at], column, column.kind === "name" ? link(i, column.key) : null)))),
      );
      count.textContent = matching.length === rows.length ? `${rows.length} rows` : `${matching.length} of ${rows.length} rows`;
      more.hidden = shown.length === matching.length;
      more.textContent = `Show all ${matching.length} rows`;
    }

    const save = make("button", { type: "button", on: { click: () => report.download(`${data.name}.csv`, "text/csv", csv(columns, matching.map((i) => rows[i]))) } }, "Download CSV");
    const meanings = columns.filter((c) => c.help);
    const meaning = make(
      "details",
      { class: "meaning" },
      make("summary", {}, "What the columns are"),
      make("dl", {}, ...meanings.flatMap((c) => [make("dt", {}, c.label), make("dd", {}, c.help)])),
    );
    element.replaceChildren(
      make("div", { class: "tools" }, make("label", {}, "Filter", filter), count, save),
      frame,
      more,
      ...(meanings.length ? [meaning] : []),
    );
    refresh();
  };
})();

// Tables of the index, which need no more than their file.
for (const element of document.querySelectorAll("[data-file]")) {
  report
    .load(element.dataset.file)
    .then((data) => report.table(element, data, { caption: "adapters", link: (i) => `${element.dataset.pages}${data.pages[i]}.html` }))
    .catch((error) => report.failed(element, error));
}
