const at = id => document.getElementById(id);
const percent = x => (100 * x).toFixed(1) + " %";
const rgb = key => getComputedStyle(document.documentElement).getPropertyValue(key).split(",").map(Number);
const mix = (a, b, t) => `rgb(${a.map((x, i) => Math.round(x + (b[i] - x) * t)).join(",")})`;
const diverging = ratio => {  // log2 of the ratio, -2 .. 2
  const t = ratio > 0 ? Math.max(-1, Math.min(1, Math.log2(ratio) / 2)) : -1;
  return t < 0 ? mix(rgb("--mid"), rgb("--low"), -t) : mix(rgb("--mid"), rgb("--high"), t);
};
const sequential = t => mix(rgb("--mid"), rgb("--one"), Math.max(0, Math.min(1, t)));
const tip = (event, text) => {
  const box = at("tip");
  box.style.display = text ? "block" : "none";
  if (!text) return;
  box.textContent = text;
  box.style.left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8) + "px";
  box.style.top = Math.min(event.clientY + 14, innerHeight - box.offsetHeight - 8) + "px";
};

// rows x columns cells with labels on the left and below; cell(r, c) gives a colour, say(r, c) a text, pick(r) takes a click.
function heatmap(canvas, rows, columns, labels, cell, say, pick, square) {
  const left = 14 + 7 * Math.max(2, ...labels.map(l => l.length)), below = 20, scale = devicePixelRatio || 1;
  const wide = Math.max(3, Math.min(square ? 18 : 32, Math.floor((1000 - left) / columns)));
  const high = square ? wide : Math.max(6, Math.min(20, Math.floor(640 / rows)));
  const gap = wide > 7 && high > 7 ? 1 : 0;
  const width = left + wide * columns + 8, height = high * rows + below;
  canvas.width = width * scale; canvas.height = height * scale;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  const g = canvas.getContext("2d");
  g.scale(scale, scale);
  for (let r = 0; r < rows; ++r)
    for (let c = 0; c < columns; ++c) {
      const colour = cell(r, c);
      if (colour === null) continue;
      g.fillStyle = colour;
      g.fillRect(left + c * wide, r * high, wide - gap, high - gap);
    }
  g.fillStyle = getComputedStyle(document.body).getPropertyValue("--soft");
  g.font = "11px system-ui, sans-serif";
  g.textBaseline = "middle"; g.textAlign = "right";
  const every = (n, size, need) => Math.max(1, Math.ceil(need / size));
  for (let r = 0; r < rows; r += every(rows, high, 12)) g.fillText(labels[r], left - 6, r * high + high / 2);
  g.textAlign = "center";
  for (let c = 0; c < columns; c += every(columns, wide, 26)) g.fillText(c, left + c * wide + wide / 2, rows * high + 11);
  const where = event => {
    const box = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - left) / wide), r = Math.floor((event.clientY - box.top) / high);
    return r >= 0 && r < rows && c >= 0 && c < columns ? [r, c] : null;
  };
  canvas.onmousemove = event => { const p = where(event); tip(event, p && say(...p)); };
  canvas.onmouseleave = event => tip(event, "");
  canvas.onclick = event => { const p = where(event); if (p && pick) pick(p[0]); };
}
