// What our output nodes gave, brought to whoever shows it: when a node has run, and again when its workflow is reopened.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { allNodes, findNode, isElsewhere, openWorkflow } from "./sage3_common.js";

const takers = new Map(); // class -> (node, output)

export function onOutput(comfyClass, take) {
    takers.set(comfyClass, take);
}

// ComfyUI brings a result to the node of that id in the tab in front, whichever it was queued from. One that belongs to
// another workflow waits here until that is in front. A result that ComfyUI had cached is told with the prompt of now but
// holds the prompt it was made for: it belongs where it is told.
const waiting = new Map(); // "workflow id" -> output
const strays = new Set(); // "prompt id"

const payloadOf = (output) => output?.sage3_run?.[0] ?? output?.sage3_compare?.[0];

function hear({ node, display_node, output, prompt_id }) {
    const id = display_node ?? node, payload = payloadOf(output);
    if (isElsewhere(payload) && payload.prompt === prompt_id) {
        waiting.set(`${payload.workflow} ${id}`, output);
        strays.add(`${prompt_id} ${id}`);
        return;
    }
    waiting.delete(`${openWorkflow()} ${id}`);
    give(findNode(id), output);
}

// What a node of the workflow in front has shown, or has not shown yet.
function keptFor(id) {
    const kept = waiting.get(`${openWorkflow()} ${id}`) ?? app.nodeOutputs?.[id], payload = payloadOf(kept);
    return isElsewhere(payload) && strays.has(`${payload.prompt} ${id}`) ? null : kept;
}

function give(node, output) {
    if (node && output) takers.get(node.comfyClass)?.(node, output);
}

app.registerExtension({
    name: "sage3.outputs",
    setup() {
        api.addEventListener("executed", ({ detail }) => hear(detail));
    },
    // A change of tabs makes the nodes anew; ComfyUI keeps their outputs and puts them back a moment later.
    afterConfigureGraph() {
        setTimeout(() => {
            for (const [id, node] of allNodes()) if (takers.has(node.comfyClass)) give(node, keptFor(id));
        }, 100);
    },
});
