// Words and tables: props.value is a list of blocks {kind, ...}, as words.py makes them.
const cell = (text, tag = "td", attributes = {}) => make(tag, attributes, text);

function table({ title, heads, rows, note }) {
  const head = make("tr", {}, heads.map((text, i) => (i || text ? cell(text, "th", { scope: "col" }) : cell(""))));
  const body = rows.map((row) =>
    row.length === 1
      ? make("tr", { class: "s3-section" }, cell(row[0], "th", { scope: "colgroup", colspan: heads.length }))
      : make("tr", {}, row.map((text, i) => (i ? cell(text) : cell(text, "th", { scope: "row" })))),
  );
  const made = make("table", {}, make("thead", {}, head), make("tbody", {}, body));
  return [title && make("h3", {}, title), note && make("p", { class: "s3-note" }, note),
    make("div", { class: "s3-scroll", tabindex: 0, role: "region", "aria-label": title || "Table" }, made)];
}

const kinds = {
  verdict: ({ text }) => [make("h2", { class: "s3-verdict" }, text)],
  heading: ({ text }) => [make("h3", {}, text)],
  text: ({ text }) => [make("p", {}, text)],
  quiet: ({ text }) => [make("p", { class: "s3-quiet" }, text)],
  banner: ({ text }) => [make("p", { class: "s3-banner", role: "note" }, text)],
  quote: ({ text }) => [make("blockquote", {}, text)],
  chips: ({ items }) => [make("ul", { class: "s3-chips" }, items.map((text) => make("li", {}, text)))],
  list: ({ items }) => [make("ul", {}, items.map((text) => make("li", {}, text)))],
  code: ({ text }) => [make("pre", { tabindex: 0, role: "region", "aria-label": "Command" }, text)],
  more: ({ text, blocks }) => [make("details", {}, make("summary", {}, text), blocks.flatMap(render))],
  table,
};
function render(block) {
  return (kinds[block.kind]?.(block) ?? []).filter(Boolean);
}

const root = make("div", { class: "s3-blocks" });
showing(root, (blocks) => root.replaceChildren(...(blocks ?? []).flatMap(render)));
