// The "Sage3" tab of the bottom panel: the map of the last run, and what this machine can do.
import { app } from "/scripts/app.js";
import { api } from "/scripts/api.js";
import { el, findNode, isElsewhere, keyOf, loadStyle, t } from "./sage3_common.js";
import { doctorView } from "./sage3_doctor.js";
import { mapView } from "./sage3_map.js";
import { refill, summary } from "./sage3_run.js";

const runs = new Map(); // workflow and node -> its last payload, the latest at the end
let chosen = null; // the key of the run whose map is shown; null: the latest
let place = null, map = null; // the elements while the tab is open

export function remember(run) {
    runs.delete(keyOf(run));
    runs.set(keyOf(run), run);
}

function name(run) {
    const node = findNode(run.node);
    const here = !isElsewhere(run) && node?.comfyClass?.startsWith("Sage3");
    const title = here ? node.title : t("Another workflow");
    return `${title} (${t("node {0}", run.node)}, ${run.precision})`;
}

function show() {
    if (!place) return;
    const all = [...runs.values()].reverse();
    const latest = all.filter((x) => x.prompt === all[0].prompt); // of these, first one that does more than leave things exact
    const run = runs.get(chosen) ?? latest.find((x) => x.exact < x.calls) ?? all[0];
    if (!run) {
        refill(place, [el("h3", {}, t("Last run")), el("div", { className: "sage3-quiet" }, t("Nothing sampled since ComfyUI started."))]);
        return;
    }
    const select = el("select", { "aria-label": t("Which run") }, all.map((x) => el("option", { value: keyOf(x), selected: x === run }, name(x))));
    select.addEventListener("change", () => {
        chosen = select.value;
        show();
    });
    refill(place, [el("div", { className: "sage3-row" }, el("h3", {}, t("Last run")), select), ...summary(run)]);
    map.replaceChildren(el("h3", {}, t("Layers and steps")), mapView(run, Math.max(200, map.parentElement.clientHeight - 100)));
}

app.registerExtension({
    name: "sage3.panel",
    bottomPanelTabs: [
        {
            id: "sage3",
            title: "Sage3",
            type: "custom",
            render(container) {
                loadStyle();
                place = el("section", { className: "sage3-last-run" });
                map = el("section", { className: "sage3-map-section" });
                const machine = el("section", {}, el("h3", {}, t("This machine")), doctorView());
                container.replaceChildren(el("div", { className: "sage3 sage3-panel" }, place, map, machine));
                show();
            },
            destroy() {
                place = null;
            },
        },
    ],
    async setup() {
        api.addEventListener("sage3.status", ({ detail: run }) => {
            remember(run);
            // while it samples a change of the map would take the reader's place on it away
            if (!run.running || !map?.contains(document.activeElement)) show();
        });
        try {
            const answer = await api.fetchApi("/sage3/runs");
            if (answer.ok) for (const run of (await answer.json()).runs) if (!runs.has(keyOf(run))) remember(run);
        } catch {
            // a server without the routes: the panel then begins with the next run
        }
    },
});
