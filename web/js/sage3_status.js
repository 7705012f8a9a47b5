// Shows what became of a model's attention calls: on each Sage3 Attention node when a sampling ends, and on each
// Sage3 Report node when it has run. A DOM widget, not a drawing on the canvas, so that it appears in the classic
// and in the Vue renderer alike.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

const WAITING = {
    Sage3Attention: "No sampling since this page was opened.",
    Sage3Report: "Not run since this page was opened.",
};
const COLOUR = { accelerated: "#5a9", fell_back: "#c83", exact: "#777" };

// A node inside subgraphs is named by the ids on the way to it: "12:7".
function findNode(id) {
    let graph = app.rootGraph ?? app.graph;
    let node = null;
    for (const part of String(id).split(":")) {
        node = graph?.getNodeById(part) ?? graph?.getNodeById(Number(part)) ?? null;
        graph = node?.subgraph;
    }
    return node;
}

function addStatus(node, text) {
    const box = document.createElement("div");
    box.textContent = text;
    Object.assign(box.style, {
        whiteSpace: "pre-wrap",
        overflowY: "auto",
        fontSize: "11px",
        lineHeight: "1.35",
        padding: "4px 6px",
        boxSizing: "border-box",
        color: "var(--descrip-text, #999)",
        background: "var(--comfy-input-bg, #222)",
        borderRadius: "4px",
    });
    const widget = node.addDOMWidget("sage3_status", "sage3_status", box, {
        serialize: false, // not part of the prompt
        hideOnZoom: false,
        getMinHeight: () => 84,
        getValue: () => box.textContent,
        setValue: () => {},
    });
    widget.serialize = false; // nor of the saved workflow
    node.sage3Status = box;
}

app.registerExtension({
    name: "sage3.status",
    nodeCreated(node) {
        const text = WAITING[node.comfyClass];
        if (text) addStatus(node, text);
    },
    setup() {
        api.addEventListener("sage3.status", ({ detail }) => {
            const box = findNode(detail.node)?.sage3Status;
            if (!box) return;
            const outcome = detail.accelerated > 0 ? "accelerated" : detail.fell_back > 0 || !detail.lines.length ? "fell_back" : "exact";
            box.textContent = detail.text;
            box.style.borderLeft = `3px solid ${COLOUR[outcome]}`;
        });
        api.addEventListener("executed", ({ detail }) => {
            const node = findNode(detail.display_node ?? detail.node);
            const text = detail.output?.text;
            if (node?.comfyClass === "Sage3Report" && node.sage3Status && text) node.sage3Status.textContent = text.join("\n");
        });
    },
});
