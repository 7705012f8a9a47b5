// Plots as pictures: props.value is a list of {caption, light, dark} with data URIs; the page's theme picks one.
const root = make("div", { class: "s3-plots",
  style: "display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,420px),1fr));gap:20px;color:var(--body-text-color)" });
showing(root, (plots) => {
  const theme = document.body.classList.contains("dark") ? "dark" : "light";
  root.hidden = !plots?.length;
  root.replaceChildren(...(plots ?? []).map(({ caption, ...pictures }) => make("figure", { style: "margin:0;min-width:0" },
    make("img", { src: pictures[theme], alt: caption, style: "width:100%;max-width:760px;height:auto;border-radius:6px" }),
    make("figcaption", { style: "font-size:13px" }, caption))));
});
