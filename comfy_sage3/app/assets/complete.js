// Words for the prompt: those that complete what is being typed, or that may come next. props.value:
// {target: element id, groups: [[name, words], ...], synonyms: {word: word}, fillers: words without a meaning}.
const root = make("div", { class: "s3-words", role: "group", "aria-label": "Words of the bundled model" });
let data = null;
const field = () => document.querySelector(`#${data.target} textarea, #${data.target} input`);

function insert(word) {
  const input = field();
  const typed = input.value.match(/[^\s,.;:!]*$/)[0].toLowerCase();
  const before = word.startsWith(typed) ? input.value.slice(0, input.value.length - typed.length) : input.value; // finish a word, or add one
  const value = `${before}${before && !/\s$/.test(before) ? " " : ""}${word} `;
  // gradio's input is a Svelte binding: it hears the native event
  Object.getOwnPropertyDescriptor(Object.getPrototypeOf(input), "value").set.call(input, value);
  input.dispatchEvent(new Event("input", { bubbles: true }));
  input.focus();
}

function offer() {
  const input = data && field();
  if (!input) return;
  const typed = input.value.toLowerCase();
  const words = typed.split(/[\s,.;:!]+/);
  const last = words.pop();
  const object = [...words, last].slice(words.lastIndexOf("and") + 1).map((word) => data.synonyms[word] ?? word);
  const open = data.groups.filter(([, values]) => !values.some((value) => object.includes(value)));
  const all = data.groups.flatMap(([, values]) => values);
  let found = last ? all.filter((word) => word.startsWith(last) && word !== last) : [];
  const next = !found.length;
  if (next && (!last || all.includes(last) || last in data.synonyms || data.fillers.includes(last))) {
    found = (open[0]?.[1] ?? []).concat(object.length > 1 && !words.includes("and") ? ["and"] : []);
  }
  root.hidden = !found.length;
  root.replaceChildren(make("span", { class: "s3-quiet" }, next ? "Go on with:" : "Complete it:"), ...found.slice(0, 8).map((word) => make("button", { type: "button", onclick: () => insert(word) }, word)));
}

showing(root, (value) => {
  data = value;
  if (!data) return;
  const wait = () => {
    const input = field();
    if (!input) return setTimeout(wait, 100);
    if (!input.dataset.s3) input.addEventListener("input", offer);
    input.dataset.s3 = "1";
    offer();
  };
  wait();
});
