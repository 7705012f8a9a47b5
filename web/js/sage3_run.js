// One run of one Sage3 Attention node, as elements: the badge, the mix of kernels, the reasons, the tables.
import { el, layersText, percent, secondsText, stepsText, t } from "./sage3_common.js";
import { bar, FELL_BACK, inOrder, kernelText, swatch } from "./sage3_kernels.js";

const GOOD = "#2fb48a", DOUBTFUL = "#e69f00", BAD = "#e8743b", NEUTRAL = "#999";

// The one thing to know: {word, colour, why}
export function verdict(run) {
    const low = run.lines.filter((line) => !line.fell_back && line.kernel !== "exact");
    if (!run.calls && run.running) return { word: t("waiting"), colour: NEUTRAL, why: "" };
    if (!run.calls) return { word: t("not active"), colour: BAD, why: t("This model never asked for attention where ComfyUI lets nodes change it.") };
    if (low.some((line) => line.kernel.endsWith("-emulated")))
        return { word: t("emulated: quality is real, speed is not"), colour: DOUBTFUL, why: "" };
    if (low.length && run.fell_back) return { word: t("partly active"), colour: DOUBTFUL, why: "" };
    if (low.length) return { word: t("active"), colour: GOOD, why: "" };
    if (run.fell_back) return { word: t("fell back"), colour: BAD, why: "" };
    if (run.precision === "auto" && run.lines.some((x) => x.reason.startsWith("auto")))
        return { word: t("not active"), colour: NEUTRAL, why: t("Nothing here is faster than exact attention.") };
    return { word: t("not active"), colour: NEUTRAL, why: t("The node's own settings left every call exact.") };
}

// The run's lines, those of one kernel together: [{kernel, fellBack, calls}]
export function mix(run) {
    const parts = new Map();
    for (const { kernel, fell_back, calls } of run.lines) {
        const key = `${kernel} ${fell_back}`;
        const part = parts.get(key) ?? { kernel, fellBack: fell_back, calls: 0 };
        part.calls += calls;
        parts.set(key, part);
    }
    return inOrder(parts.values());
}

// "attention took 1.60 s, 3.20 s saved"; null while not known
export function timeText(run) {
    const seconds = run.seconds && Object.values(run.seconds).reduce((sum, x) => sum + x, 0);
    if (!seconds) return null;
    const took = t("attention took {0}", secondsText(seconds));
    const saved = run.saved_seconds;
    if (saved === null || saved === undefined) return took;
    return `${took}, ${saved >= 0 ? t("{0} saved", secondsText(saved)) : t("{0} lost", secondsText(-saved))}`;
}

// Everything in one glance; what a Sage3 Attention node shows.
export function summary(run) {
    const { word, colour, why } = verdict(run);
    const step = run.running ? t("step {0} of {1}", run.step, run.steps) : run.steps ? stepsText(run.steps) : null;
    const head = el("div", { className: "sage3-row" },
        el("span", { className: "sage3-badge", style: { background: colour } }, word),
        el("span", { className: "sage3-quiet" }, [step, timeText(run)].filter(Boolean).join(" · ")),
    );
    const parts = mix(run);
    const total = t("{0} attention calls", run.calls);
    const legend = parts.map(({ kernel, fellBack, calls }) =>
        el("span", {}, swatch(kernel, fellBack), `${kernelText(kernel, fellBack)} ${calls} (${percent(calls, run.calls)})`),
    );
    const made = [head];
    if (run.calls) made.push(bar(parts, `${total}: ${parts.map((p) => `${kernelText(p.kernel, p.fellBack)} ${p.calls}`).join(", ")}`));
    if (run.calls) made.push(el("div", { className: "sage3-legend" }, el("span", { className: "sage3-quiet" }, total), legend));
    for (const note of [why, ...notes(run)]) if (note) made.push(el("div", { className: "sage3-quiet" }, note));
    return [...made, reasons(run)].filter(Boolean);
}

// What the run's text says beyond its counts: that the model names no layers, that another node took the place, ...
function notes(run) {
    return run.calls ? run.notes : [];
}

// Why calls fell back, in the open; why others are exact by choice, on demand.
function reasons(run) {
    const line = (x) => el("div", { className: `sage3-reason${x.fell_back ? "" : " sage3-chosen"}` }, `${x.calls} × ${kernelText(x.kernel)}: ${x.reason}`);
    const fell = run.lines.filter((x) => x.fell_back && x.reason).map(line);
    const rest = run.lines.filter((x) => !x.fell_back && x.reason).map(line);
    const folded = rest.length ? el("details", { "data-key": "why" }, el("summary", { className: "sage3-quiet" }, t("Why")), rest) : null;
    return fell.length || folded ? el("div", {}, fell, folded) : null;
}

// Rows by kernel, and by layer on demand; what a Sage3 Report node shows below the summary.
export function tables(run) {
    const made = [];
    if (run.lines.length) {
        const rows = mix(run).map(({ kernel, fellBack, calls }) =>
            el("tr", {},
                el("td", {}, swatch(kernel, fellBack), kernelText(kernel, fellBack)),
                el("td", {}, String(calls)),
                el("td", {}, percent(calls, run.calls)),
                el("td", {}, run.seconds?.[kernel] === undefined ? "–" : secondsText(run.seconds[kernel])),
            ),
        );
        made.push(table([t("kernel"), t("calls"), t("share"), t("time")], rows));
    }
    if (run.layers?.length) {
        const rows = run.layers.map((layer) => {
            const parts = inOrder(Object.entries(layer.kernels).map(([kernel, calls]) => ({ kernel, fellBack: false, calls })));
            const label = parts.map((p) => `${kernelText(p.kernel)} ${p.calls}`).join(", ");
            const fell = layer.fell_back ? el("span", { style: { color: FELL_BACK }, title: layer.reasons.join("\n") }, String(layer.fell_back)) : "–";
            return el("tr", { title: layer.reasons.join("\n") },
                el("td", {}, layer.layer || t("without a number")),
                el("td", {}, bar(parts, label)),
                el("td", {}, String(layer.calls)),
                el("td", {}, fell),
                el("td", {}, layer.seconds === null || layer.seconds === undefined ? "–" : secondsText(layer.seconds)),
            );
        });
        const heads = [t("layer"), t("kernels"), t("calls"), t("fell back"), t("time")];
        made.push(el("details", { "data-key": "layers" }, el("summary", {}, layersText(run.layers.length)), table(heads, rows)));
    }
    return made;
}

function table(heads, rows) {
    return el("table", {}, el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody", {}, rows));
}

// Put new children in place of the old; what the reader had unfolded stays so.
export function refill(box, children) {
    const open = new Set([...box.querySelectorAll("details[open]")].map((d) => d.dataset.key));
    box.replaceChildren(...children);
    for (const details of box.querySelectorAll("details")) details.open = open.has(details.dataset.key);
}

