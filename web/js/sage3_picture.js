// Draws a pair of pictures on a canvas in one of the four ways. Knows nothing of nodes.

const GAP = 6; // between pictures side by side
const scratch = document.createElement("canvas");
let measured = null; // the last difference: {a, b, factor}, whose pixels lie in ``scratch``

// Draw ``pair`` {a, b} by ``how`` {mode, wipe, factor, side}. Returns where the picture lies across: {x, w}, parts of the width.
export function draw(canvas, pair, how) {
    const ratio = window.devicePixelRatio || 1;
    const seen = canvas.getBoundingClientRect(); // with the zoom of the workflow
    const width = Math.max(1, Math.round(seen.width * ratio)), height = Math.max(1, Math.round(seen.height * ratio));
    if (canvas.width !== width) canvas.width = width;
    if (canvas.height !== height) canvas.height = height;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, width, height);
    const { naturalWidth: w, naturalHeight: h } = pair.a;
    const across = how.mode === "side" ? 2 * w : w;
    const gap = how.mode === "side" ? GAP * ratio : 0;
    const scale = Math.min((width - gap) / across, height / h);
    const [dw, dh] = [w * scale, h * scale];
    const x = (width - across * scale - gap) / 2, y = (height - dh) / 2;
    context.imageSmoothingEnabled = scale < 1; // enlarged pixels stay pixels: that is what is compared
    context.imageSmoothingQuality = "high";
    if (how.mode === "side") {
        context.drawImage(pair.a, x, y, dw, dh);
        context.drawImage(pair.b, x + dw + gap, y, dw, dh);
    } else if (how.mode === "difference") {
        context.drawImage(difference(pair.a, pair.b, how.factor), x, y, dw, dh);
    } else if (how.mode === "blink") {
        context.drawImage(pair[how.side], x, y, dw, dh);
    } else {
        wipe(context, pair, { x, y, dw, dh, line: x + dw * how.wipe, ratio });
    }
    return { x: x / width, w: (across * scale + gap) / width };
}

function wipe(context, pair, { x, y, dw, dh, line, ratio }) {
    context.drawImage(pair.b, x, y, dw, dh);
    context.save();
    context.beginPath();
    context.rect(x, y, line - x, dh);
    context.clip();
    context.drawImage(pair.a, x, y, dw, dh);
    context.restore();
    const middle = y + dh / 2, size = 7 * ratio;
    context.lineWidth = 4 * ratio;
    context.strokeStyle = "rgb(0 0 0 / 55%)";
    stroke(context, line, y, y + dh);
    context.lineWidth = 2 * ratio;
    context.strokeStyle = "#fff";
    stroke(context, line, y, y + dh);
    for (const side of [-1, 1]) {
        context.beginPath();
        context.moveTo(line + side * 1.6 * size, middle);
        context.lineTo(line + side * 0.6 * size, middle - size * 0.8);
        context.lineTo(line + side * 0.6 * size, middle + size * 0.8);
        context.closePath();
        context.fillStyle = "#fff";
        context.fill();
        context.lineWidth = ratio;
        context.strokeStyle = "rgb(0 0 0 / 55%)";
        context.stroke();
    }
}

function stroke(context, x, from, to) {
    context.beginPath();
    context.moveTo(x, from);
    context.lineTo(x, to);
    context.stroke();
}

// |b - a| * factor in each colour, as a canvas.
function difference(a, b, factor) {
    if (measured && measured.a === a && measured.b === b && measured.factor === factor) return scratch;
    const { naturalWidth: w, naturalHeight: h } = a;
    scratch.width = w;
    scratch.height = h;
    const context = scratch.getContext("2d", { willReadFrequently: true });
    const pixels = (image) => {
        context.drawImage(image, 0, 0);
        return context.getImageData(0, 0, w, h);
    };
    const first = pixels(a).data, out = pixels(b);
    for (let i = 0; i < first.length; i++) if (i % 4 !== 3) out.data[i] = Math.min(255, Math.abs(out.data[i] - first[i]) * factor);
    context.putImageData(out, 0, 0);
    measured = { a, b, factor };
    return scratch;
}
