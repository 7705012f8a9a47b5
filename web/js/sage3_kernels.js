// How a kernel is called and coloured, everywhere alike. The colours are told apart by colour-blind eyes too (Okabe and Ito),
// and by their lightness in grey; stripes mean emulated, and where there is room a letter says it again.
import { el, t } from "./sage3_common.js";

const KINDS = [
    // the first whose name begins the kernel's
    { name: "fp4", colour: "#56b4e9", letter: "4" },
    { name: "int8-fast", colour: "#f0e442", letter: "f" },
    { name: "int8", colour: "#009e73", letter: "8" },
    { name: "exact", colour: "#8a8a8a", letter: "" },
];
const OTHER = { name: "other", colour: "#cc79a7", letter: "?" };
export const FELL_BACK = "#d55e00";

// "int8-fast-emulated" -> {name, colour, letter, emulated}
export function kindOf(kernel) {
    const kind = KINDS.find((known) => kernel.startsWith(known.name)) ?? OTHER;
    return { ...kind, emulated: kernel.endsWith("-emulated") };
}

// A CSS background for a kernel; what fell back to exact attention is the colour of a warning.
export function fill(kernel, fellBack = false) {
    const { colour, emulated } = kindOf(kernel);
    const own = fellBack && kernel === "exact" ? FELL_BACK : colour;
    return emulated ? `repeating-linear-gradient(135deg, ${own} 0 4px, color-mix(in srgb, ${own} 55%, black) 4px 6px)` : own;
}

export function swatch(kernel, fellBack = false) {
    const border = fellBack ? `2px solid ${FELL_BACK}` : "";
    return el("span", { className: "sage3-swatch", style: { background: fill(kernel, fellBack), border, boxSizing: "border-box" } });
}

// "fp4-emulated" -> "fp4, emulated"
export function kernelText(kernel, fellBack = false) {
    const name = kernel.replace(/-emulated$/, "");
    const parts = [name === "exact" ? t("exact") : name];
    if (kernel !== name) parts.push(t("emulated"));
    if (fellBack) parts.push(t("fell back"));
    return parts.join(", ");
}

// The order in which kernels are shown: fewer bits first, those that fell back last.
export function inOrder(parts) {
    const rank = ({ kernel, fellBack }) => KINDS.findIndex((known) => kernel.startsWith(known.name)) + (fellBack ? 100 : 0);
    return [...parts].sort((one, other) => rank(one) - rank(other));
}

// A bar of parts: [{kernel, fellBack, calls}]
export function bar(parts, label) {
    const pieces = parts.map(({ kernel, fellBack, calls }) =>
        el("span", {
            style: { flex: `${calls} 1 0`, background: fill(kernel, fellBack) },
            title: `${kernelText(kernel, fellBack)}: ${calls}`,
        }),
    );
    return el("div", { className: "sage3-bar", role: "img", "aria-label": label }, pieces);
}
