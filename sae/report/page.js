"use strict";
// Draws every .plot from the JSON that follows it, in the colours of the page, and again when these change.

const dark = matchMedia("(prefers-color-scheme: dark)");
const touch = matchMedia("(pointer: coarse)").matches;
// Where nothing hovers plotly would show its buttons at all times.
const hovers = matchMedia("(hover: hover)").matches;
const options = {
  responsive: true,
  displaylogo: false,
  displayModeBar: hovers && !touch ? "hover" : false,
  modeBarButtons: [["toImage", "resetScale2d"]],
};

// "var(--ink)" becomes the colour of that name; {cosines, columns} becomes a matrix, a byte in it is 1/127.
function revive(css) {
  return (key, value) => {
    if (typeof value === "string" && value.startsWith("var(--")) {
      return css.getPropertyValue(value.slice(4, -1)).trim();
    }
    if (value && value.cosines !== undefined) {
      const bytes = Int8Array.from(atob(value.cosines), (character) => character.charCodeAt(0));
      const rows = [];
      for (let start = 0; start < bytes.length; start += value.columns) {
        rows.push(Float32Array.from(bytes.subarray(start, start + value.columns), (byte) => byte / 127));
      }
      return rows;
    }
    return value;
  };
}

function draw() {
  const css = getComputedStyle(document.documentElement);
  for (const element of document.querySelectorAll(".plot")) {
    const figure = JSON.parse(element.nextElementSibling.textContent, revive(css));
    if (touch) figure.layout.dragmode = false; // a finger scrolls the page
    Plotly.react(element, figure.data, figure.layout, options);
    // A point that names a row of a table leads to it.
    element.removeAllListeners("plotly_click");
    element.on("plotly_click", ({ points: [point] }) => {
      const row = point.customdata && document.getElementById(`member-${point.customdata}`);
      if (row) location.hash = row.id;
    });
  }
}

dark.addEventListener("change", draw);
draw();
