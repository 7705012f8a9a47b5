// Two videos (or pictures) as one view: split, side by side, blink and amplified difference, frame by frame.
// props.value: {id, frames, width, height, columns, sheets: {a, b}, labels: [a, b], psnr, ssim, worst, fps}; a sheet holds
// all frames of a side, row by row.
const MODES = { split: "Split", side: "Side by side", blink: "Blink", difference: "Difference" };
const GAINS = [1, 2, 4, 8, 16, 32, 64];
const BLINK = 600; // ms
const ZOOM = 6, LENS = 19; // the loupe: so many times enlarged, so many pixels of the video across
const GAP = 8; // between the pictures side by side

let data = null, images = null, frame = 0, playing = false, mode = "split", line = 0.5, gain = 8, seen = "a";
let loupe = false, point = [0.5, 0.5], last = 0, blinked = 0, ticking = 0, difference = null, box = null;
const sources = { a: document.createElement("canvas"), b: document.createElement("canvas") }; // the current frame of each
const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;

const modes = Object.entries(MODES).map(([key, name]) => make("button", { type: "button", "data-mode": key, onclick: () => look(key) }, name));
const gains = make("select", { "aria-label": "How many times the difference is amplified" }, GAINS.map((k) => make("option", { value: k }, `× ${k}`)));
gains.value = gain;
gains.addEventListener("change", () => { gain = Number(gains.value); draw(); });
const lens = make("button", { type: "button", "aria-pressed": "false", onclick: () => { loupe = !loupe; draw(); } }, "Loupe");
const canvas = make("canvas", { tabindex: 0, role: "img", "data-testid": "player" });
const left = make("span", { class: "s3-label s3-left" }), right = make("span", { class: "s3-label s3-right" });
const scale = make("div", { class: "s3-scale" }, make("span", {}, "0"), make("i", {}), make("span", { class: "s3-most" }), make("span", { class: "s3-quiet" }, "levels of 255 apart"));
const play = make("button", { type: "button", class: "s3-play", onclick: () => setPlaying(!playing) });
const slider = make("input", { type: "range", min: 0, max: 0, step: 1, value: 0, "aria-label": "Frame" });
slider.addEventListener("input", () => { setPlaying(false); go(Number(slider.value)); });
const count = make("span", { class: "s3-count" });
const numbers = make("p", { class: "s3-numbers" });
const worst = make("button", { type: "button", onclick: () => { setPlaying(false); go(data.worst); } }, "Worst frame");
const curve = makeSvg("svg", { viewBox: "0 0 1000 60", preserveAspectRatio: "none", role: "img" });
const graph = make("div", { class: "s3-curve" }, curve);
const time = make("div", { class: "s3-row" }, play, slider, count);
const stage = make("div", { class: "s3-stage" }, canvas, left, right);
const keys = make("p", { class: "s3-quiet s3-keys" });
const root = make("div", { class: "s3-player" },
  make("div", { class: "s3-row", role: "group", "aria-label": "How to look" }, modes, gains, lens),
  stage, scale, time, graph,
  make("div", { class: "s3-row s3-foot" }, numbers, worst),
  keys);

function setData(next) {
  const fresh = !data || !next || next.id !== data.id;
  data = next;
  root.hidden = !data;
  if (!data || !fresh) return;
  images = null;
  difference = null;
  frame = 0;
  setPlaying(false);
  const many = data.frames > 1;
  for (const part of [time, graph, worst]) part.hidden = !many;
  const moves = many ? "← → frames, space plays, shift + ← → moves the line" : "← → moves the line";
  keys.textContent = `On the picture: ${moves}, 1 to 4 ways to look, L the loupe.`;
  slider.max = data.frames - 1;
  plot();
  const coming = { a: new Image(), b: new Image() }, mine = data.id;
  for (const [key, image] of Object.entries(coming)) image.src = data.sheets[key];
  Promise.all(Object.values(coming).map((image) => image.decode())).then(() => {
    if (data?.id !== mine) return;
    images = coming;
    go(0);
    if (!calm && many) setPlaying(true);
  }, () => { numbers.textContent = "The pictures did not arrive: load the page again."; });
  draw();
}

function look(next) {
  mode = next;
  seen = "a";
  blinked = performance.now();
  draw();
  run();
}

function go(to) {
  if (!data) return;
  frame = ((to % data.frames) + data.frames) % data.frames;
  draw();
}

function setPlaying(on) {
  playing = on && (data?.frames ?? 0) > 1;
  play.textContent = playing ? "❚❚" : "▶";
  play.setAttribute("aria-label", playing ? "Pause" : "Play");
  last = performance.now();
  run();
}

function run() { // one clock for playing and blinking
  cancelAnimationFrame(ticking);
  if (playing || mode === "blink") ticking = requestAnimationFrame(tick);
}

function tick(now) {
  if (!root.isConnected) return;
  if (playing && now - last >= 1000 / data.fps) {
    last = now;
    go(frame + 1);
  }
  if (mode === "blink" && now - blinked >= BLINK) {
    blinked = now;
    seen = seen === "a" ? "b" : "a";
    draw();
  }
  run();
}

function cut() { // the current frame of each side, at its own size
  const { width, height, columns } = data;
  for (const key of ["a", "b"]) {
    const source = sources[key];
    if (source.width !== width) source.width = width;
    if (source.height !== height) source.height = height;
    source.getContext("2d", { willReadFrequently: true }).drawImage(images[key], (frame % columns) * width, Math.floor(frame / columns) * height, width, height, 0, 0, width, height);
  }
}

function amplified() { // |B - A| times the gain, in each colour
  const key = `${data.id} ${frame} ${gain}`;
  if (difference?.key === key) return difference;
  const { width, height } = data;
  const made = difference ?? document.createElement("canvas");
  made.width = width;
  made.height = height;
  const pixels = (source) => source.getContext("2d", { willReadFrequently: true }).getImageData(0, 0, width, height);
  const a = pixels(sources.a).data, out = pixels(sources.b);
  for (let i = 0; i < a.length; i++) if (i % 4 !== 3) out.data[i] = Math.min(255, Math.abs(out.data[i] - a[i]) * gain);
  made.getContext("2d").putImageData(out, 0, 0);
  made.key = key;
  difference = made;
  return made;
}

function draw() {
  describe();
  if (!data) return;
  const ratio = window.devicePixelRatio || 1;
  const across = mode === "side" ? 2 * data.width : data.width, gap = mode === "side" ? GAP * ratio : 0;
  const room = Math.max(1, stage.clientWidth) * ratio, high = Math.min(640, innerHeight * 0.55) * ratio;
  let size = Math.min((room - gap) / across, high / data.height);
  if (size > 1) size = Math.floor(size); // whole pixels: none is wider than another
  const w = Math.round(data.width * size), h = Math.round(data.height * size);
  const total = mode === "side" ? 2 * w + gap : w;
  if (canvas.width !== total || canvas.height !== h) [canvas.width, canvas.height] = [total, h];
  canvas.style.width = `${total / ratio}px`;
  canvas.style.height = `${h / ratio}px`;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.clearRect(0, 0, total, h);
  if (!images) return;
  cut();
  context.imageSmoothingEnabled = size < 1; // enlarged pixels stay pixels: they are what is compared
  box = { w, h, size, gap, total };
  if (mode === "side") {
    context.drawImage(sources.a, 0, 0, w, h);
    context.drawImage(sources.b, w + gap, 0, w, h);
  } else if (mode === "blink") context.drawImage(sources[seen], 0, 0, w, h);
  else if (mode === "difference") context.drawImage(amplified(), 0, 0, w, h);
  else split(context, w, h, ratio);
  if (loupe) magnify(context, ratio);
}

function split(context, w, h, ratio) {
  const x = Math.round(w * line);
  context.drawImage(sources.b, 0, 0, w, h);
  context.save();
  context.beginPath();
  context.rect(0, 0, x, h);
  context.clip();
  context.drawImage(sources.a, 0, 0, w, h);
  context.restore();
  for (const [width, style] of [[4 * ratio, "rgb(0 0 0 / 55%)"], [2 * ratio, "#fff"]]) {
    context.fillStyle = style;
    context.fillRect(x - width / 2, 0, width, h);
  }
  context.beginPath();
  context.arc(x, h / 2, 9 * ratio, 0, 7);
  context.fillStyle = "#fff";
  context.fill();
  context.lineWidth = ratio;
  context.strokeStyle = "rgb(0 0 0 / 55%)";
  context.stroke();
}

function magnify(context, ratio) { // the same spot of A and of B, far enlarged, beside each other
  const { w, h, total } = box, { width, height } = data;
  const n = Math.min(LENS, width, height), side = n * ZOOM * ratio, border = 2 * ratio;
  const cx = clamp(Math.round(point[0] * width - n / 2), 0, width - n), cy = clamp(Math.round(point[1] * height - n / 2), 0, height - n);
  const wide = 2 * side + 3 * border;
  const x = clamp(point[0] < 0.5 ? total - wide - 6 * ratio : 6 * ratio, 0, Math.max(0, total - wide));
  const y = clamp(point[1] < 0.5 ? h - side - 28 * ratio : 36 * ratio, 0, Math.max(0, h - side - 24 * ratio));
  context.save();
  context.imageSmoothingEnabled = false;
  context.fillStyle = "#fff";
  context.fillRect(x, y, wide, side + 2 * border + 16 * ratio);
  for (const [i, key] of ["a", "b"].entries()) {
    const at = x + border + i * (side + border);
    context.drawImage(sources[key], cx, cy, n, n, at, y + border, side, side);
    context.fillStyle = "#000";
    context.font = `${11 * ratio}px system-ui, sans-serif`;
    context.fillText(data.labels[i], at + 2 * ratio, y + side + border + 13 * ratio, side);
  }
  context.strokeStyle = "#fff";
  context.lineWidth = ratio;
  context.strokeRect((cx / width) * w, (cy / height) * h, (n / width) * w, (n / height) * h);
  context.restore();
}

function describe() {
  for (const button of modes) button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  lens.setAttribute("aria-pressed", String(loupe));
  gains.hidden = scale.hidden = mode !== "difference";
  scale.querySelector(".s3-most").textContent = `${(255 / gain).toFixed(gain > 16 ? 1 : 0)}+`;
  if (!data) return;
  const [a, b] = data.labels, two = mode === "split" || mode === "side";
  left.textContent = two ? a : mode === "blink" ? (seen === "a" ? a : b) : `|B − A| × ${gain}`;
  right.textContent = two ? b : "";
  right.hidden = !two;
  count.textContent = `${frame + 1} / ${data.frames}`;
  slider.value = frame;
  const said = spoken();
  numbers.textContent = said;
  slider.setAttribute("aria-valuetext", `frame ${frame + 1} of ${data.frames}, ${said}`);
  canvas.setAttribute("aria-label", `${MODES[mode]}: ${two ? `${a} and ${b}` : left.textContent}, frame ${frame + 1} of ${data.frames}`);
  mark();
}

function spoken() {
  const psnr = data.psnr[frame], ssim = data.ssim[frame];
  if (psnr === null || psnr === undefined) return "this frame is identical on both sides";
  return `PSNR ${psnr.toFixed(2)} dB, SSIM ${ssim.toFixed(4)}`;
}

function plot() { // the lower, the further apart; identical frames lie at the top
  const known = data.psnr.filter((value) => value !== null), many = data.frames > 1;
  const low = Math.min(...known), high = Math.max(...known);
  const x = (i) => (many ? (1000 * i) / (data.frames - 1) : 500);
  const y = (value) => (value === null ? 6 : 54 - ((value - low) / (high - low || 1)) * 42);
  const words = known.length ? `PSNR of every frame, ${low.toFixed(1)} to ${high.toFixed(1)} dB; the lowest is frame ${data.worst + 1}` : "All frames are identical";
  curve.setAttribute("aria-label", words);
  const thin = { "vector-effect": "non-scaling-stroke", fill: "none" };
  curve.replaceChildren(
    makeSvg("polyline", { points: data.psnr.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" "), class: "s3-line", ...thin }),
    makeSvg("line", { x1: x(data.worst), x2: x(data.worst), y1: 44, y2: 60, class: "s3-worst", ...thin }),
    makeSvg("line", { y1: 0, y2: 60, class: "s3-now", ...thin }));
  graph.replaceChildren(curve, make("span", { class: "s3-quiet s3-high" }, known.length ? `${high.toFixed(1)} dB` : ""),
    make("span", { class: "s3-quiet s3-low" }, known.length && high > low ? `${low.toFixed(1)} dB, frame ${data.worst + 1}` : ""));
}

function mark() {
  const now = curve.querySelector(".s3-now"), x = data.frames > 1 ? (1000 * frame) / (data.frames - 1) : 500;
  for (const end of ["x1", "x2"]) now?.setAttribute(end, x);
}

// A click on the curve goes to the worst frame; near another frame's place it goes there.
graph.addEventListener("click", (event) => {
  if (!data) return;
  const bounds = graph.getBoundingClientRect();
  const at = Math.round(((event.clientX - bounds.left) / bounds.width) * (data.frames - 1));
  setPlaying(false);
  const near = Math.max(1, Math.round(data.frames / 30));
  go(Math.abs(at - data.worst) <= near ? data.worst : at);
});

function follow(event) {
  const bounds = canvas.getBoundingClientRect();
  const x = (event.clientX - bounds.left) / bounds.width, y = (event.clientY - bounds.top) / bounds.height;
  if (mode === "side" && box) {
    const at = x * box.total;
    point = [clamp((at > box.w + box.gap / 2 ? at - box.w - box.gap : at) / box.w, 0, 1), clamp(y, 0, 1)];
  } else point = [clamp(x, 0, 1), clamp(y, 0, 1)];
  if (mode === "split" && (event.type === "pointerdown" || canvas.hasPointerCapture(event.pointerId))) line = clamp(x, 0, 1);
  draw();
}
canvas.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  canvas.setPointerCapture(event.pointerId);
  follow(event);
});
canvas.addEventListener("pointermove", (event) => { if (loupe || canvas.hasPointerCapture(event.pointerId)) follow(event); });
canvas.addEventListener("keydown", (event) => {
  if (!data || event.ctrlKey || event.altKey || event.metaKey) return;
  const step = event.key === "ArrowLeft" ? -1 : 1;
  const arrow = () => {
    if (event.shiftKey || data.frames === 1) line = clamp(line + 0.02 * step, 0, 1);
    else {
      setPlaying(false);
      frame += step;
    }
    go(frame);
  };
  const does = { ArrowLeft: arrow, ArrowRight: arrow, " ": () => setPlaying(!playing && data.frames > 1), l: () => lens.click(), L: () => lens.click(),
    Home: () => go(0), End: () => go(-1), ...Object.fromEntries(Object.keys(MODES).map((key, i) => [String(i + 1), () => look(key)])) }[event.key];
  if (!does) return;
  event.preventDefault();
  does();
});
new ResizeObserver(() => draw()).observe(stage);
showing(root, setData);
