// What moves in a page besides its plots: the slider over steps, and a picture in full size.
"use strict";

function showStep(timeline, place) {
  const steps = JSON.parse(timeline.dataset.steps);
  timeline.querySelector("output").textContent = steps[place];
  for (const picture of timeline.querySelectorAll("[data-place]")) {
    picture.hidden = Number(picture.dataset.place) !== place;
  }
}

for (const timeline of document.querySelectorAll(".timeline")) {
  const slider = timeline.querySelector("input[type=range]");
  slider.addEventListener("input", () => showStep(timeline, slider.valueAsNumber));
  showStep(timeline, slider.valueAsNumber); // a browser remembers where it was
}

const zoom = document.getElementById("zoom");
document.addEventListener("click", ({ target }) => {
  const button = target.closest("button.picture");
  if (button && zoom) {
    const large = zoom.querySelector("img");
    const small = [...button.querySelectorAll("img")].find((picture) => !picture.hidden);
    if (!small) return;
    Object.assign(large, { src: small.src, alt: small.alt });
    large.className = small.className;
    zoom.querySelector("p").textContent = small.alt;
    zoom.showModal();
  } else if (zoom && zoom.open) {
    zoom.close();
  }
});
