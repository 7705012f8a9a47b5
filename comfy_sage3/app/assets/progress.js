// A run as it goes on: how far, what is running, since when, and each side's steps and last preview.
const bar = make("progress", { max: 1, value: 0, "aria-label": "The whole comparison" });
const doing = make("p", { class: "s3-doing", role: "status" });
const clock = make("span", { class: "s3-clock" });
const sides = {};
const panel = (key) => {
  const title = make("strong");
  const steps = make("progress", { max: 1, value: 0, "aria-label": `Steps of side ${key.toUpperCase()}` });
  const text = make("span", { class: "s3-quiet" });
  const picture = make("img", { alt: "", class: "s3-preview" });
  const made = make("div", { class: "s3-side" }, make("div", { class: "s3-row" }, title, text), steps, picture);
  return Object.assign(made, { title_: title, steps, text, picture });
};
for (const key of ["a", "b"]) sides[key] = panel(key);
const both = make("div", { class: "s3-sides" }, sides.a, sides.b);
const root = make("div", { class: "s3-progress" }, make("div", { class: "s3-row" }, doing, clock), bar, both);

let began = null, ticking = 0;
const seconds = (value) => (value < 60 ? `${value.toFixed(0)} s` : `${Math.floor(value / 60)} min ${Math.floor(value % 60)} s`);
const tick = () => {
  if (began !== null) clock.textContent = seconds((performance.now() - began) / 1000);
  if (!root.isConnected) clearInterval(ticking);
};

showing(root, (state) => {
  root.hidden = !state;
  clearInterval(ticking);
  began = null;
  if (!state) return;
  if (state.running) {
    began = performance.now() - 1000 * state.seconds;
    ticking = setInterval(tick, 500);
  }
  root.classList.toggle("s3-failed", Boolean(state.failed));
  bar.hidden = both.hidden = !state.running; // what is over takes a line
  bar.value = state.fraction;
  doing.textContent = state.doing;
  clock.textContent = seconds(state.seconds);
  for (const [key, side] of Object.entries(sides)) {
    const said = state.sides?.[key];
    side.hidden = !said;
    if (!said) continue;
    side.classList.toggle("s3-active", Boolean(said.active));
    side.title_.textContent = said.name;
    side.text.textContent = said.text;
    side.steps.max = Math.max(1, said.steps);
    side.steps.value = said.done;
    side.picture.hidden = !said.preview;
    side.picture.alt = said.preview ? `${said.name}, as it looks so far` : "";
    if (said.preview && side.picture.src !== said.preview) side.picture.src = said.preview;
  }
});
