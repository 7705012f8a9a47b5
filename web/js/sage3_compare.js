// Sage3 Compare on its node: two pictures or videos, four ways to look at them, frame by frame.
import { app } from "/scripts/app.js";
import { addWidget, el, holdPointer, t } from "./sage3_common.js";
import { curve } from "./sage3_curve.js";
import { Frames } from "./sage3_frames.js";
import { onOutput } from "./sage3_outputs.js";
import { draw } from "./sage3_picture.js";

const MODES = ["wipe", "side", "difference", "blink"];
const FACTORS = [1, 4, 10, 30];
const BLINK = 600; // ms
const boxes = new WeakMap(); // node -> Compare

class Compare {
    constructor() {
        this.mode = "wipe";
        this.wipe = 0.5; // the line's place, 0 to 1 of the picture
        this.factor = 10;
        this.at = 0; // which of the shown frames
        this.side = "a"; // which is seen in blink
        this.playing = false;
        this.data = null;
        this.frames = null;
        this.build();
    }

    build() {
        const names = { wipe: t("Wipe"), side: t("Side by side"), difference: t("Difference"), blink: t("Blink") };
        this.buttons = MODES.map((mode) => el("button", { type: "button", onclick: () => this.look(mode), "data-mode": mode }, names[mode]));
        this.factors = el("select", { "aria-label": t("How many times the difference is amplified") },
            FACTORS.map((k) => el("option", { value: k, selected: k === this.factor }, `× ${k}`)));
        this.factors.addEventListener("change", () => {
            this.factor = Number(this.factors.value);
            this.show();
        });
        this.canvas = el("canvas", { tabIndex: 0 });
        this.left = el("span", { className: "sage3-side sage3-left" });
        this.right = el("span", { className: "sage3-side sage3-right" });
        this.message = el("div", { className: "sage3-message" }, t("Run the workflow to compare."));
        this.play = el("button", { type: "button", onclick: () => this.setPlaying(!this.playing) });
        this.slider = el("input", { type: "range", min: 0, max: 0, value: 0, className: "sage3-fill", "aria-label": t("Frame") });
        this.slider.addEventListener("input", () => this.go(Number(this.slider.value)));
        this.count = el("span", { className: "sage3-count" });
        this.numbers = el("span", { className: "sage3-fill sage3-numbers", "aria-live": "polite" });
        this.worst = el("button", { type: "button", className: "sage3-worst", onclick: () => this.goToWorst() });
        this.curve = curve((index) => this.goToFrame(index));
        this.time = el("div", { className: "sage3-row" }, this.play, this.slider, this.count);
        this.notes = el("div", { className: "sage3-quiet" });
        this.element = el("div", { className: "sage3 sage3-compare" },
            el("div", { className: "sage3-row", role: "group", "aria-label": t("How to look") }, this.buttons, this.factors),
            el("div", { className: "sage3-stage" }, this.canvas, this.left, this.right, this.message),
            this.time,
            this.curve.element,
            el("div", { className: "sage3-row" }, this.numbers, this.worst),
            this.notes,
        );
        for (const control of [...this.buttons, this.factors, this.play, this.slider, this.worst, this.curve.element]) holdPointer(control);
        for (const control of [this.slider, this.factors]) control.addEventListener("keydown", (event) => event.stopPropagation());
        this.showTime(false);
        this.listen();
        new ResizeObserver(() => this.show()).observe(this.canvas);
        this.refresh();
    }

    // Pointer and keys on the picture.
    listen() {
        const move = (event) => {
            const box = this.canvas.getBoundingClientRect();
            const picture = this.picture ?? { x: 0, w: 1 };
            const x = (event.clientX - box.left) / box.width;
            this.wipe = Math.max(0, Math.min(1, (x - picture.x) / picture.w));
            this.show();
        };
        this.canvas.addEventListener("pointerdown", (event) => {
            event.stopPropagation();
            if (event.button !== 0 || this.mode !== "wipe" || !this.data) return;
            this.canvas.setPointerCapture(event.pointerId);
            move(event);
        });
        this.canvas.addEventListener("pointermove", (event) => this.canvas.hasPointerCapture(event.pointerId) && move(event));
        this.canvas.addEventListener("keydown", (event) => {
            const wipe = (by) => this.mode === "wipe" && ((this.wipe = Math.max(0, Math.min(1, this.wipe + by))), this.show());
            const does = {
                ArrowLeft: () => (this.mode === "wipe" ? wipe(-0.02) : this.go(this.at - 1)),
                ArrowRight: () => (this.mode === "wipe" ? wipe(0.02) : this.go(this.at + 1)),
                ArrowUp: () => this.go(this.at - 1),
                ArrowDown: () => this.go(this.at + 1),
                " ": () => (this.frames?.count > 1 ? this.setPlaying(!this.playing) : (this.swap(), this.blink())),
            }[event.key];
            if (!does || !this.data) return;
            event.preventDefault();
            event.stopPropagation();
            does();
        });
    }

    setData(data) {
        this.data = data;
        this.frames = new Frames(data, () => this.show());
        this.at = 0;
        this.setPlaying(false);
        this.slider.max = this.frames.count - 1;
        this.showTime(this.frames.count > 1);
        this.worst.textContent = `${t("Worst frame")}: ${data.worst + 1}`;
        if (data.identical === data.frames) this.worst.style.display = "none"; // none is worse than another
        this.notes.textContent = data.notes.join("\n");
        this.curve.setData(data);
        this.refresh();
    }

    // What has to do with time; a still has none.
    showTime(shown) {
        for (const part of [this.time, this.curve.element, this.worst]) part.style.display = shown ? "" : "none";
    }

    look(mode) {
        this.mode = mode;
        this.side = "a";
        this.blink();
        this.refresh();
    }

    // Change sides from now on, in this mode.
    blink() {
        clearInterval(this.blinking);
        if (this.mode === "blink") this.blinking = setInterval(() => (this.canvas.isConnected ? this.swap() : clearInterval(this.blinking)), BLINK);
    }

    swap() {
        this.side = this.side === "a" ? "b" : "a";
        this.show();
    }

    go(at) {
        const last = (this.frames?.count ?? 1) - 1;
        this.at = Math.max(0, Math.min(last, at));
        this.show();
    }

    // To a frame by its number in the whole video, or the nearest of those shown.
    goToFrame(index) {
        const { shown } = this.data;
        this.go(shown.reduce((best, frame, i) => (Math.abs(frame - index) < Math.abs(shown[best] - index) ? i : best), 0));
    }

    goToWorst() {
        this.setPlaying(false);
        this.goToFrame(this.data.worst);
    }

    setPlaying(playing) {
        this.playing = playing;
        clearTimeout(this.timer);
        this.play.textContent = playing ? "❚❚" : "▶";
        this.play.ariaLabel = playing ? t("Stop") : t("Play");
        if (playing) this.tick();
    }

    tick() {
        this.timer = setTimeout(() => {
            if (!this.canvas.isConnected) return this.setPlaying(false);
            const next = (this.at + 1) % this.frames.count;
            if (this.frames.ready(next)) this.go(next);
            this.tick();
        }, 1000 / this.data.fps);
    }

    refresh() {
        for (const button of this.buttons) button.ariaPressed = String(button.dataset.mode === this.mode);
        this.factors.style.display = this.mode === "difference" ? "" : "none";
        this.canvas.classList.toggle("sage3-wiping", this.mode === "wipe");
        this.show();
    }

    show() {
        this.describe();
        if (!this.data) return;
        const pair = this.frames.get(this.at);
        this.message.textContent = this.frames.lost ? t("These pictures are gone from ComfyUI's temp folder: run the workflow again.") : "";
        if (pair) this.picture = draw(this.canvas, pair, this);
        const index = this.data.shown[this.at];
        this.slider.value = this.at;
        this.count.textContent = `${index + 1} / ${this.data.frames}`;
        this.numbers.textContent = numbers(this.data, index);
        this.slider.setAttribute("aria-valuetext", `${t("frame {0} of {1}", index + 1, this.data.frames)}, ${this.numbers.textContent}`);
        this.curve.mark(index);
    }

    // The names over the picture, and what a screen reader says of it.
    describe() {
        const [a, b] = this.data?.labels ?? ["A", "B"];
        const two = this.mode === "wipe" || this.mode === "side";
        const left = two ? a : this.mode === "blink" ? (this.side === "a" ? a : b) : `|${b} − ${a}| × ${this.factor}`;
        this.left.textContent = this.data ? left : "";
        this.right.textContent = this.data && two ? b : "";
        const wipes = this.mode === "wipe";
        this.canvas.setAttribute("role", wipes ? "slider" : "img");
        this.canvas.setAttribute("aria-label", wipes ? t("Wipe between {0} and {1}", a, b) : left);
        for (const [name, value] of [["aria-valuemin", 0], ["aria-valuemax", 100], ["aria-valuenow", Math.round(100 * this.wipe)]])
            if (wipes) this.canvas.setAttribute(name, value);
            else this.canvas.removeAttribute(name);
    }

    stop() {
        clearInterval(this.blinking);
        this.setPlaying(false);
    }
}

function numbers(data, index) {
    const psnr = data.psnr[index], ssim = data.ssim[index];
    if (psnr === "identical") return t("identical");
    return `${closeness(psnr)} · PSNR ${psnr.toFixed(2)} dB${ssim === null ? "" : ` · SSIM ${ssim.toFixed(4)}`}`;
}

// A PSNR in words: what an eye makes of two pictures that far apart.
function closeness(psnr) {
    if (psnr >= 45) return t("hardly visible");
    if (psnr >= 35) return t("small differences");
    return psnr >= 25 ? t("visible differences") : t("another picture");
}

app.registerExtension({
    name: "sage3.compare",
    nodeCreated(node) {
        if (node.comfyClass !== "Sage3Compare") return;
        const made = new Compare();
        boxes.set(node, made);
        const widget = addWidget(node, "sage3_compare", made.element, 340, [420, 540]);
        widget.onRemove = () => made.stop();
    },
});
onOutput("Sage3Compare", (node, output) => {
    const data = output.sage3_compare?.[0];
    if (data) boxes.get(node)?.setData(data);
});
