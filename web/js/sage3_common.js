// What every part of the front end needs: elements, nodes by id, DOM widgets, words, numbers. No part of it draws.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

const SVG = "http://www.w3.org/2000/svg";
let words = {}; // English -> the user's language

// An element with properties, and children that are elements or texts. A text is always a text, never markup.
export function el(tag, properties = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(properties)) {
        if (name === "style") Object.assign(made.style, value);
        else if (name in made) made[name] = value;
        else made.setAttribute(name, value);
    }
    made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
    return made;
}

export function svg(tag, attributes = {}, ...children) {
    const made = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
}

// A node inside subgraphs is named by the ids on the way to it: "12:7".
export function findNode(id) {
    let graph = app.rootGraph ?? app.graph;
    let node = null;
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part)) ?? null;
        graph = node?.subgraph;
    }
    return node;
}

// The id of the workflow in the tab in front; undefined where the front end gives workflows none.
export function openWorkflow() {
    return (app.rootGraph ?? app.graph)?.id;
}

// Whether a payload is of a workflow that is not the one in front. Its nodes may have the same ids.
export function isElsewhere(payload) {
    const open = openWorkflow();
    return Boolean(payload?.workflow && open && payload.workflow !== open);
}

// What tells a workflow's node from another's with the same id.
export function keyOf(payload) {
    return `${payload.workflow ?? ""} ${payload.node}`;
}

// Every node of the open workflow, those in subgraphs too, with its id as in findNode.
export function* allNodes(graph = app.rootGraph ?? app.graph, path = "") {
    for (const node of graph?.nodes ?? []) {
        yield [`${path}${node.id}`, node];
        if (node.subgraph) yield* allNodes(node.subgraph, `${path}${node.id}:`);
    }
}

// A DOM widget shows in the classic and in the Vue renderer alike. It is not part of the prompt or of the saved workflow.
// ``size`` is what a new node has at least; a saved one comes back as it was.
export function addWidget(node, name, element, height, size) {
    const widget = node.addDOMWidget(name, name, element, {
        serialize: false,
        hideOnZoom: false,
        getMinHeight: () => height + 2 * (widget?.margin ?? 10),
        getValue: () => "",
        setValue: () => {},
    });
    widget.serialize = false;
    element.style.minHeight = `${height}px`; // the Vue renderer goes by the element alone
    element.dataset.node = node.id;
    const named = node.onAdded; // a new node gets its id when it is put into a graph
    node.onAdded = function (...args) {
        named?.apply(this, args);
        element.dataset.node = this.id;
    };
    leaveZoomToCanvas(element);
    node.setSize([Math.max(node.size[0], size[0]), Math.max(node.size[1], size[1])]);
    node.setDirtyCanvas?.(true, true);
    return widget;
}

// In the classic renderer a DOM widget lies over the canvas: where it has nothing to scroll, the wheel zooms as elsewhere.
function leaveZoomToCanvas(element) {
    element.addEventListener("wheel", (event) => {
        const scrolls = !event.ctrlKey && element.scrollHeight > element.clientHeight + 1;
        if (scrolls) event.stopPropagation();
        else if (!window.LiteGraph?.vueNodesMode) {
            event.preventDefault();
            app.canvas.canvas.dispatchEvent(new WheelEvent("wheel", event));
        }
    });
}

// A control on a node is pressed, not the node dragged by it.
export function holdPointer(element) {
    for (const kind of ["pointerdown", "mousedown", "dblclick"]) element.addEventListener(kind, (event) => event.stopPropagation());
    return element;
}

export function loadStyle() {
    const href = new URL("../css/sage3.css", import.meta.url).href;
    if (![...document.styleSheets].some((sheet) => sheet.href === href)) document.head.append(el("link", { rel: "stylesheet", href }));
}

export function setting(id, otherwise) {
    return app.extensionManager?.setting?.get(id) ?? otherwise;
}

// The pack's words in the user's language; English where there are none.
export async function loadWords() {
    const language = setting("Comfy.Locale", "en");
    if (language === "en") return;
    try {
        const all = await (await api.fetchApi("/i18n")).json();
        words = all[language]?.sage3 ?? {};
    } catch {
        words = {};
    }
}

// t("step {0} of {1}", 3, 20)
export function t(text, ...values) {
    return (words[text] ?? text).replace(/\{(\d)\}/g, (_, i) => values[i] ?? "");
}

export function layersText(count) {
    return count === 1 ? t("1 layer") : t("{0} layers", count);
}

export function stepsText(count) {
    return count === 1 ? t("1 step") : t("{0} steps", count);
}

export function secondsText(seconds) {
    const size = Math.abs(seconds);
    return size < 0.0995 ? `${(seconds * 1000).toFixed(size < 0.00995 ? 1 : 0)} ms` : `${seconds.toFixed(size < 10 ? 2 : 1)} s`;
}

export function percent(part, whole) {
    const value = whole ? (100 * part) / whole : 0;
    return value > 0 && value < 1 ? "<1 %" : `${Math.round(value)} %`;
}
