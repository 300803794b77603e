"use strict";
for (const chart of document.querySelectorAll(".chart")) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const area = chart.querySelector(".area"), cursor = chart.querySelector(".cursor"), out = chart.querySelector("output");
  const steps = p => p.length === 2 ? [p[0], p[0]] : [p[0], p[1]];
  const number = v => Math.abs(v) >= 1000 ? Math.round(v).toLocaleString("en") : String(Number(v.toPrecision(4)));
  const distance = (p, step) => { const [a, b] = steps(p); return step < a ? a - step : step > b ? step - b : 0; };
  const show = event => {
    const box = area.getBoundingClientRect();
    const step = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * data.last;
    const texts = [];
    for (const line of data.lines) {
      const point = line.points.reduce((best, p) => distance(p, step) < distance(best, step) ? p : best);
      const [first, last] = steps(point);
      texts.push(point.length === 2 ? `${line.name} ${number(point[1])} (step ${first})`
        : `${line.name} ${number(point[2])} on average, ${number(point[3])} to ${number(point[4])} (steps ${first}–${last})`);
    }
    cursor.style.left = `${100 * step / data.last}%`;
    cursor.hidden = false;
    out.textContent = texts.join(" · ");
  };
  area.addEventListener("pointermove", show);
  area.addEventListener("pointerdown", show);
  area.addEventListener("pointerleave", () => { cursor.hidden = true; out.textContent = ""; });
}
const renewed = document.getElementById("renewed"), age = Date.now() / 1000 - Number(renewed.dataset.time);
const running = document.body.dataset.status === "running";
if (running && age > 600) {
  renewed.textContent += `: ${Math.round(age / 60)} minutes before this page was opened. Where a step takes less, the run has been killed.`;
} else if (running) {
  setInterval(() => { if (!document.querySelector(".area:hover")) location.reload(); }, 30000);
}
