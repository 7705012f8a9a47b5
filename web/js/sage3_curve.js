// The PSNR of every frame as a line under the frame slider: the lower, the further from A. A click goes to that frame.
import { el, svg, t } from "./sage3_common.js";

const W = 1000, H = 44, TOP = 5, FOOT = 5;

// {element, setData(data), mark(index)}; ``onChoose`` gets the index of the frame that was clicked.
export function curve(onChoose) {
    const plot = svg("svg", { viewBox: `0 0 ${W} ${H}`, preserveAspectRatio: "none", role: "img" });
    const top = el("span", { className: "sage3-quiet" }), foot = el("span", { className: "sage3-quiet" });
    const element = el("div", { className: "sage3-curve" }, plot, top, foot);
    let frames = 1, cursor = null;
    const x = (index) => (frames > 1 ? (W * index) / (frames - 1) : W / 2);

    element.addEventListener("click", (event) => {
        const box = element.getBoundingClientRect();
        onChoose(Math.round(((event.clientX - box.left) / box.width) * (frames - 1)));
    });

    function setData(data) {
        frames = data.frames;
        const known = data.psnr.filter((value) => typeof value === "number");
        const low = Math.min(...known), high = Math.max(...known);
        // identical frames lie above all others
        const y = (value) => (typeof value !== "number" ? TOP : H - FOOT - ((value - low) / (high - low || 1)) * (H - 3 * TOP - FOOT));
        const points = data.psnr.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
        const thin = { "vector-effect": "non-scaling-stroke", fill: "none" };
        cursor = svg("line", { y1: 0, y2: H, stroke: "currentColor", "stroke-width": 1, ...thin });
        const label = known.length ? t("PSNR of each frame, {0} to {1} dB", low.toFixed(1), high.toFixed(1)) : t("identical");
        plot.setAttribute("aria-label", label);
        top.textContent = known.length ? `${high.toFixed(1)} dB` : "";
        foot.textContent = known.length && high > low ? `${low.toFixed(1)} dB` : "";
        plot.replaceChildren(
            svg("title", {}, label),
            svg("rect", { width: W, height: H, fill: "currentColor", "fill-opacity": 0.06 }),
            svg("polyline", { points, stroke: "#56b4e9", "stroke-width": 2, ...thin }),
            cursor,
        );
        if (known.length) plot.append(svg("line", { x1: x(data.worst), x2: x(data.worst), y1: H - 9, y2: H, stroke: "#e8743b", "stroke-width": 4, ...thin }));
        mark(0);
    }

    function mark(index) {
        for (const end of ["x1", "x2"]) cursor?.setAttribute(end, x(index));
    }

    return { element, setData, mark };
}
