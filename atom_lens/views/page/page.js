"use strict";
// Light or dark: what the reader's system prefers, until the button says otherwise.
const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
function isDark() {
  return (root.style.colorScheme || (system.matches ? "dark" : "light")) === "dark";
}
function tellTheme() {
  document.getElementById("theme").setAttribute("aria-pressed", String(isDark()));
  document.dispatchEvent(new Event("theme"));
}
document.getElementById("theme").addEventListener("click", () => {
  root.style.colorScheme = isDark() ? "light" : "dark";
  tellTheme();
});
system.addEventListener("change", tellTheme);
tellTheme();

// data: is JSON in a script element; only textContent ever meets it.
function dataOf(id) {
  return JSON.parse(document.getElementById(id).textContent);
}
function make(name, className, text, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined && text !== null) made.textContent = text;
  made.append(...children);
  return made;
}

// A plot for each choice; a panel without one is hidden.
for (const select of document.querySelectorAll("select[data-section]")) {
  select.addEventListener("change", () => {
    const { section } = select.dataset;
    for (const plot of document.querySelectorAll(".plot")) {
      if (plot.dataset.section === section) plot.hidden = plot.dataset.choice !== select.value;
    }
    for (const panel of document.querySelectorAll(`#${section} .panel`)) {
      panel.hidden = !panel.querySelector(".plot:not([hidden])");
    }
  });
}
