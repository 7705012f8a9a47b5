"use strict";
// Plays the sheets of frames in step: one clock, one frame number, every canvas.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const canvases = [...document.querySelectorAll("canvas[data-sheet]")];
  const sheets = canvases.map((c) => document.getElementById(c.dataset.sheet));
  const [play, scrub, where, worst] = ["play", "scrub", "where", "worst"].map((id) => document.getElementById(id));
  const frameMilliseconds = 125;
  let frame = 0;
  let playing = false;
  let last = 0;

  function show(next) {
    frame = ((next % data.frames) + data.frames) % data.frames;
    const x = (frame % data.columns) * data.width;
    const y = Math.floor(frame / data.columns) * data.height;
    canvases.forEach((canvas, i) => {
      canvas.getContext("2d").drawImage(sheets[i], x, y, data.width, data.height, 0, 0, data.width, data.height);
    });
    scrub.value = frame;
    where.textContent = `frame ${frame + 1} of ${data.frames}, PSNR ${data.psnr[frame]}`;
  }

  function setPlaying(on) {
    playing = on && data.frames > 1;
    play.textContent = playing ? "Pause" : "Play";
    if (playing) requestAnimationFrame((now) => { last = now; requestAnimationFrame(tick); });
  }

  function tick(now) {
    if (!playing) return;
    if (now - last >= frameMilliseconds) {
      show(frame + 1);
      last = now;
    }
    requestAnimationFrame(tick);
  }

  play.addEventListener("click", () => setPlaying(!playing));
  scrub.addEventListener("input", () => { setPlaying(false); show(Number(scrub.value)); });
  worst.addEventListener("click", () => { setPlaying(false); show(data.worst); });
  document.addEventListener("keydown", (event) => {
    if (event.target instanceof HTMLInputElement || event.target instanceof HTMLButtonElement) return;
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      setPlaying(false);
      show(frame + (event.key === "ArrowRight" ? 1 : -1));
    }
  });

  show(0);
  Promise.all(sheets.map((sheet) => sheet.decode().catch(() => {}))).then(() => {
    show(0);
    setPlaying(!matchMedia("(prefers-reduced-motion: reduce)").matches);
  });
})();
