// A box that scrolls sideways can be reached by the keyboard, also one in a fold that is opened later,
// and fades at its right edge while there is more.
{
  const boxes = [
    "div.claims",
    "div.settings",
    "div.cell_output > .output",
    "div.math",
    ".pst-scrollable-table-container",
    "pre",
  ].join();
  const fade = (box) =>
    box.classList.toggle("has-more", box.scrollWidth - box.clientWidth - box.scrollLeft > 8);
  const reach = () => {
    for (const box of document.querySelectorAll(boxes)) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
      fade(box);
    }
  };
  addEventListener("load", reach);
  addEventListener("resize", reach);
  addEventListener("toggle", reach, true); // a fold; it does not bubble
  addEventListener("scroll", ({ target }) => target.matches?.(boxes) && fade(target), true);
}
