// A toast when the GPU's kernels are being built, are ready, or could not be built. Silent where they were found ready.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { setting, t } from "./sage3_common.js";

const PATIENCE = 1500; // ms; a build that fails at once is told as a failure only
const SEVERITY = { building: "info", built: "success", failed: "warn" };
const told = new Set();
let waiting = null;

function toast({ state, text }) {
    if (told.has(state) || !SEVERITY[state] || !setting("Sage3.Toasts", true)) return;
    told.add(state);
    const summary = { building: t("Sage3: building kernels"), built: t("Sage3: kernels ready"), failed: t("Sage3: no kernels") }[state];
    app.extensionManager.toast.add({ severity: SEVERITY[state], summary, detail: text, life: state === "failed" ? 20000 : 8000 });
}

function hear(build) {
    clearTimeout(waiting);
    if (build.state === "building") waiting = setTimeout(() => toast(build), PATIENCE);
    else toast(build);
}

app.registerExtension({
    name: "sage3.build",
    settings: [
        {
            id: "Sage3.Toasts",
            category: ["Sage3", "Display", "Toasts"],
            name: "Tell when the GPU's kernels are built or cannot be",
            type: "boolean",
            defaultValue: true,
        },
    ],
    async setup() {
        api.addEventListener("sage3.build", ({ detail }) => hear(detail));
        try {
            const answer = await api.fetchApi("/sage3/runs");
            const { build } = answer.ok ? await answer.json() : {};
            if (build && build.state !== "built") hear(build); // what happened before this page was opened
        } catch {
            // a server without the routes tells by events alone
        }
    },
});
