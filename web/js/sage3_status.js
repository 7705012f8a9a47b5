// Shows on each Sage3 Attention node what became of its calls, when a sampling ends.
// A DOM widget, not a drawing on the canvas: it appears in the classic and in the Vue renderer alike.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";

const NODE = "Sage3Attention";
const WIDGET = "sage3_status";
const WAITING = "No sampling yet.";

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

function addStatus(node) {
    const box = document.createElement("div");
    box.textContent = WAITING;
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
    const widget = node.addDOMWidget(WIDGET, "sage3_status", box, {
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
        if (node.comfyClass === NODE) addStatus(node);
    },
    setup() {
        api.addEventListener("sage3.status", ({ detail }) => {
            const box = findNode(detail.node)?.sage3Status;
            if (!box) return;
            box.textContent = detail.text;
            box.style.borderLeft = `3px solid ${detail.accelerated > 0 ? "#5a9" : detail.fell_back > 0 || !detail.lines.length ? "#c83" : "#777"}`;
        });
    },
});
