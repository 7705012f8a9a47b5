// Sage3 Report shows its run as tables: by kernel, and by layer on demand.
import { app } from "/scripts/app.js";
import { addWidget, el, findNode, isElsewhere, t } from "./sage3_common.js";
import { onOutput } from "./sage3_outputs.js";
import { remember } from "./sage3_panel.js";
import { refill, summary, tables } from "./sage3_run.js";
import { showRun } from "./sage3_status.js";

const boxes = new WeakMap();

function show(node, output) {
    const box = boxes.get(node);
    const runs = output.sage3_run ?? [];
    const many = runs.length > 1;
    const parts = runs.flatMap((run) => [many ? el("strong", {}, t("Node {0}", run.node)) : null, ...summary(run), ...tables(run)]);
    if (!runs.length) parts.push(el("span", {}, (output.text ?? []).join("\n")));
    refill(box, parts.filter(Boolean));
    for (const run of runs) {
        // a node that ComfyUI did not run again, or whose tab was changed meanwhile, has seen no event
        const attention = isElsewhere(run) ? null : findNode(run.node);
        if (attention) showRun(attention, run);
        remember(run);
    }
}

app.registerExtension({
    name: "sage3.report",
    nodeCreated(node) {
        if (node.comfyClass !== "Sage3Report") return;
        const box = el("div", { className: "sage3 sage3-report" }, el("span", { className: "sage3-quiet" }, t("Not run yet.")));
        boxes.set(node, box);
        addWidget(node, "sage3_report", box, 130, [340, 260]);
    },
});
onOutput("Sage3Report", show);
