// What this machine can run, as the doctor found it: asked for on demand, for it runs every kernel and may have to build them.
import { api } from "/scripts/api.js";
import { el, t } from "./sage3_common.js";
import { kernelText, swatch } from "./sage3_kernels.js";

// An element that shows the result, or a button that asks for it.
export function doctorView() {
    const box = el("div", {});
    const ask = async (path) => {
        const answer = await api.fetchApi(path);
        return answer.json();
    };
    const offer = () => {
        const button = el("button", { type: "button" }, t("Examine this machine"));
        button.addEventListener("click", async () => {
            button.disabled = true;
            button.textContent = t("Examining …");
            try {
                box.replaceChildren(...result(await ask("/sage3/doctor")));
            } catch (error) {
                box.replaceChildren(el("div", { className: "sage3-bad" }, t("The server does not answer: {0}", error.message)));
            }
        });
        const hint = t("Runs every kernel once on a small problem, and builds those that are not built yet.");
        box.replaceChildren(button, el("div", { className: "sage3-quiet" }, hint));
    };
    offer();
    ask("/sage3/doctor?known=1").then((found) => found && box.replaceChildren(...result(found)), () => {});
    return box;
}

function result(found) {
    if (found.error) return [el("div", { className: "sage3-bad" }, found.error)];
    const { versions } = found;
    const made = [el("div", { className: "sage3-quiet" }, `comfy_sage3 ${versions.comfy_sage3} · torch ${versions.torch} · Python ${versions.python}`)];
    for (const device of found.devices) {
        const rows = found.decisions.filter((x) => x.device === device.device).map((x) => row(x, found.self_test));
        const heads = [t("precision"), t("runs on"), t("self-test")].map((head) => el("th", { scope: "col" }, head));
        made.push(
            el("div", {}, el("strong", {}, device.device), ` ${device.description}`),
            el("table", { className: "sage3-doctor" }, el("thead", {}, el("tr", {}, heads)), el("tbody", {}, rows)),
        );
    }
    return made;
}

function row(decision, tests) {
    const test = tests.find((x) => x.device === decision.device && x.precision === decision.precision);
    const verdict = !test ? el("span", { className: "sage3-quiet" }, "–")
        : test.ok ? el("span", { className: "sage3-ok", title: t("cosine {0} against exact attention", test.cosine?.toFixed(6)) }, `✓ ${kernelText(test.kernel)}`)
        : el("span", { className: "sage3-bad" }, `✗ ${test.error}`);
    return el("tr", {},
        el("td", {}, decision.precision),
        el("td", {}, swatch(decision.kernel, decision.fell_back), kernelText(decision.kernel, decision.fell_back),
            decision.reason ? el("div", { className: "sage3-quiet" }, decision.reason) : null),
        el("td", {}, verdict),
    );
}
