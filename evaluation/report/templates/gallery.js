"use strict";
// The gallery: the cards that match the filters, one page at a time.
(() => {
  const gallery = document.getElementById("gallery");
  if (!gallery) return;
  const pageSize = Number(gallery.dataset.pageSize);
  const pictures = JSON.parse(document.getElementById("pictures").textContent);
  const form = document.getElementById("filters");
  const search = document.getElementById("search");
  const status = document.getElementById("status");
  const selects = [...form.querySelectorAll("[data-filter]")];
  const steps = [...document.querySelectorAll("[data-step]")];
  const cards = [...document.querySelectorAll("template.card")];
  const texts = new Map();
  let page = 0;

  function textOf(card) {
    if (!texts.has(card)) {
      texts.set(card, card.content.textContent.replace(/\s+/g, " ").toLowerCase());
    }
    return texts.get(card);
  }

  function matching() {
    const wanted = selects.filter((select) => select.value);
    const words = search.value.trim().replace(/\s+/g, " ").toLowerCase();
    return cards.filter(
      (card) =>
        wanted.every((select) => card.dataset[select.dataset.filter] === select.value) &&
        (!words || textOf(card).includes(words)),
    );
  }

  function drawn(card) {
    const copy = card.content.cloneNode(true);
    for (const image of copy.querySelectorAll("img[data-picture]")) {
      image.src = pictures[image.dataset.picture];
    }
    return copy;
  }

  function show() {
    const found = matching();
    const last = Math.max(Math.ceil(found.length / pageSize) - 1, 0);
    page = Math.min(Math.max(page, 0), last);
    const start = page * pageSize;
    const shown = found.slice(start, start + pageSize);
    gallery.replaceChildren(...shown.map(drawn));
    status.textContent = found.length
      ? `${start + 1}–${start + shown.length} of ${found.length}`
      : "No sample fits these filters";
    for (const button of steps) {
      button.disabled = Number(button.dataset.step) < 0 ? page === 0 : page === last;
    }
    remember();
  }

  // The address contains the filters, so that a link or a reload shows the same samples.
  function remember() {
    const state = new URLSearchParams();
    for (const select of selects) {
      if (select.value) state.set(select.dataset.filter, select.value);
    }
    if (search.value) state.set("text", search.value);
    if (page) state.set("page", String(page + 1));
    const words = state.toString();
    if (words || location.hash.includes("=")) history.replaceState(null, "", `#${words}`);
  }

  function recall() {
    const state = new URLSearchParams(location.hash.slice(1));
    for (const select of selects) {
      select.value = state.get(select.dataset.filter) ?? "";
      if (select.selectedIndex < 0) select.value = "";
    }
    search.value = state.get("text") ?? "";
    page = Number(state.get("page") ?? 1) - 1 || 0;
  }

  function restart() {
    page = 0;
    show();
  }

  function turn(step) {
    page += step;
    show();
    document.getElementById("samples").scrollIntoView();
  }

  form.addEventListener("input", restart);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(restart));
  for (const button of steps) {
    button.addEventListener("click", () => turn(Number(button.dataset.step)));
  }
  gallery.addEventListener("click", (event) => {
    const button = event.target.closest("[data-find]");
    if (!button) return;
    for (const select of selects) select.value = "";
    search.value = button.dataset.find;
    restart();
    search.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (event.target.closest("input, select, textarea, .scroll")) return;
    if (event.key === "/") {
      event.preventDefault();
      search.focus();
    } else if (event.key === "ArrowLeft" && !steps[0].disabled) {
      turn(-1);
    } else if (event.key === "ArrowRight" && !steps[1].disabled) {
      turn(1);
    }
  });
  addEventListener("hashchange", () => {
    recall();
    show();
  });

  recall();
  show();
})();
