// The map of a run: a row for each layer, a column for each step, coloured by the kernel that did most of the work there.
import { el, layersText, stepsText, t } from "./sage3_common.js";
import { inOrder, kernelText, kindOf, swatch } from "./sage3_kernels.js";

const LEFT = 64, TOP = 5, BOTTOM = 22; // room for names of layers and numbers of steps

// An element for run.map. ``height`` is what it may take before it scrolls.
export function mapView(run, height = 300) {
    const { layers, steps, cells } = run.map ?? { layers: [], steps: 0, cells: [] };
    if (!layers.length || !steps)
        return el("div", { className: "sage3-quiet" }, t("No map: this model does not say which layer calls, or nothing was sampled."));
    const w = Math.max(5, Math.min(26, Math.floor(620 / steps)));
    const h = Math.max(5, Math.min(20, Math.floor((height - TOP - BOTTOM) / layers.length)));
    const canvas = el("canvas", {
        tabIndex: 0,
        role: "img",
        "aria-label": `${t("Map of layers and steps")}: ${layersText(layers.length)}, ${stepsText(steps)}`,
        style: { width: `${LEFT + w * steps}px`, height: `${TOP + h * layers.length + BOTTOM}px` },
    });
    const read = el("div", { className: "sage3-quiet", "aria-live": "polite" }, t("Point at the map, or focus it and press the arrow keys."));
    let at = null; // the chosen cell: [row, column]

    function choose(row, column) {
        at = [Math.max(0, Math.min(layers.length - 1, row)), Math.max(0, Math.min(steps - 1, column))];
        const kernel = cells[at[0]]?.[at[1]];
        const name = layers[at[0]] || t("without a number");
        read.textContent = `${t("layer {0}, step {1}", name, at[1] + 1)}: ${kernel ? kernelText(kernel) : t("no call")}`;
        canvas.title = read.textContent;
        draw(canvas, { layers, steps, cells, w, h, at });
    }
    canvas.addEventListener("pointermove", (event) => {
        const row = Math.floor((event.offsetY - TOP) / h), column = Math.floor((event.offsetX - LEFT) / w);
        if (row >= 0 && row < layers.length && column >= 0 && column < steps) choose(row, column);
    });
    canvas.addEventListener("keydown", (event) => {
        const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
        if (!move) return;
        event.preventDefault();
        event.stopPropagation();
        if (at) choose(at[0] + move[0], at[1] + move[1]);
        else choose(0, 0);
    });
    draw(canvas, { layers, steps, cells, w, h, at });

    const used = inOrder([...new Set(cells.flat().filter(Boolean))].map((kernel) => ({ kernel })));
    const legend = el("div", { className: "sage3-legend" }, used.map(({ kernel }) => el("span", {}, swatch(kernel), kernelText(kernel))),
        cells.flat().includes(null) ? el("span", { className: "sage3-quiet" }, t("empty: no call")) : null);
    return el("div", {}, legend, el("div", { className: "sage3-map" }, canvas), read);
}

function draw(canvas, { layers, steps, cells, w, h, at }) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = (LEFT + w * steps) * ratio;
    canvas.height = (TOP + h * layers.length + BOTTOM) * ratio;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    const text = getComputedStyle(document.body).getPropertyValue("--descrip-text").trim() || "#999";
    const gap = h > 7 && w > 7 ? 1 : 0;
    context.textBaseline = "middle";
    cells.forEach((row, i) => row.forEach((kernel, j) => kernel && drawCell(context, kindOf(kernel), LEFT + j * w, TOP + i * h, w - gap, h - gap)));

    context.fillStyle = text;
    context.font = "10px system-ui, sans-serif";
    context.textAlign = "right";
    const every = Math.ceil(11 / h);
    layers.forEach((name, i) => i % every === 0 && context.fillText(name || "–", LEFT - 6, TOP + (i + 0.5) * h, LEFT - 8));
    context.textAlign = "center";
    const each = Math.ceil(20 / w);
    for (let j = 0; j < steps; j += each) context.fillText(String(j + 1), LEFT + (j + 0.5) * w, TOP + h * layers.length + 10);
    context.textAlign = "right";
    context.fillText(t("step"), LEFT - 6, TOP + h * layers.length + 10);
    if (at) {
        context.strokeStyle = getComputedStyle(document.body).getPropertyValue("--input-text").trim() || "#fff";
        context.lineWidth = 2;
        context.strokeRect(LEFT + at[1] * w, TOP + at[0] * h, w - gap, h - gap);
    }
}

function drawCell(context, { colour, letter, emulated }, x, y, w, h) {
    context.fillStyle = colour;
    context.fillRect(x, y, w, h);
    if (emulated && w > 6) {
        context.save();
        context.beginPath();
        context.rect(x, y, w, h);
        context.clip();
        context.strokeStyle = "rgb(0 0 0 / 35%)";
        context.lineWidth = 1.5;
        context.beginPath();
        for (let d = -h; d < w; d += 6) {
            context.moveTo(x + d, y + h);
            context.lineTo(x + d + h, y);
        }
        context.stroke();
        context.restore();
    }
    if (letter && w >= 11 && h >= 11) {
        context.fillStyle = "#000";
        context.textAlign = "center";
        context.font = "bold 9px system-ui, sans-serif";
        context.fillText(letter, x + w / 2, y + h / 2 + 0.5);
    }
}
