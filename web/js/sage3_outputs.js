// What our output nodes gave, brought to whoever shows it: when a node has run, and again when its workflow is reopened.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { allNodes, findNode } from "./sage3_common.js";

const takers = new Map(); // class -> (node, output)

export function onOutput(comfyClass, take) {
    takers.set(comfyClass, take);
}

function give(node, output) {
    if (node && output) takers.get(node.comfyClass)?.(node, output);
}

app.registerExtension({
    name: "sage3.outputs",
    setup() {
        api.addEventListener("executed", ({ detail }) => give(findNode(detail.display_node ?? detail.node), detail.output));
    },
    // A change of tabs makes the nodes anew; ComfyUI keeps their outputs and puts them back a moment later.
    afterConfigureGraph() {
        setTimeout(() => {
            for (const [id, node] of allNodes()) if (takers.has(node.comfyClass)) give(node, app.nodeOutputs?.[id]);
        }, 100);
    },
});
