// Sage3 Attention says on the node what becomes of the model's attention, while it samples and after.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { addWidget, allNodes, el, findNode, isElsewhere, keyOf, loadStyle, loadWords, openWorkflow, setting, t } from "./sage3_common.js";
import { refill, summary } from "./sage3_run.js";

const CLASSES = ["Sage3Attention", "Sage3TrainingAttention"];
const boxes = new WeakMap(); // node -> its element
const last = new Map(); // workflow and node -> its last run, for when the workflow comes to the front again

export function showRun(node, run) {
    const box = boxes.get(node);
    if (!box) return;
    if (run.workflow) last.set(keyOf(run), run);
    refill(box, summary(run));
    box.dataset.state = run.running ? "running" : "done";
}

app.registerExtension({
    name: "sage3.status",
    settings: [
        {
            id: "Sage3.LiveStatus",
            category: ["Sage3", "Display", "LiveStatus"],
            name: "Show on Sage3 Attention what happens while sampling",
            tooltip: "Off: the node is told once, when sampling has ended.",
            type: "boolean",
            defaultValue: true,
        },
    ],
    async setup() {
        loadStyle();
        await loadWords();
        api.addEventListener("sage3.status", ({ detail: run }) => {
            if (run.running && !setting("Sage3.LiveStatus", true)) return;
            const node = isElsewhere(run) ? null : findNode(run.node);
            if (node) showRun(node, run);
            else if (run.workflow) last.set(keyOf(run), run);
        });
    },
    // A change of tabs makes the nodes anew.
    afterConfigureGraph() {
        for (const [id, node] of allNodes()) {
            const run = last.get(keyOf({ workflow: openWorkflow(), node: id }));
            if (run) showRun(node, run);
        }
    },
    nodeCreated(node) {
        if (!CLASSES.includes(node.comfyClass)) return;
        const hint = el("span", { className: "sage3-quiet" }, t("Nothing sampled since this page was opened."));
        const box = el("div", { className: "sage3 sage3-status", "data-state": "waiting" }, hint);
        boxes.set(node, box);
        addWidget(node, "sage3_status", box, 96, [300, 0]);
    },
});
