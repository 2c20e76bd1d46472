// What the theme leaves out for those who do not use a mouse or a screen: each navigation has a name
// of its own, the buttons of a code block are no navigation, and what scrolls can be reached by Tab.
function name_and_reach() {
  for (const buttons of document.querySelectorAll("nav.md-code__nav")) {
    const group = document.createElement("div");
    group.className = buttons.className;
    group.append(...buttons.childNodes);
    buttons.replaceWith(group);
  }
  const seen = new Set();
  for (const navigation of document.querySelectorAll("nav")) {
    const label = navigation.getAttribute("aria-labelledby");
    const said = navigation.getAttribute("aria-label")
      || document.getElementById(label)?.textContent.trim() || "Navigation";
    let name = said;
    for (let number = 2; seen.has(name); number += 1) name = `${said} ${number}`;
    seen.add(name);
    if (name !== said) {
      navigation.removeAttribute("aria-labelledby");
      navigation.setAttribute("aria-label", name);
    }
  }
  for (const box of document.querySelectorAll(".md-typeset__scrollwrap, .md-typeset pre > code")) {
    if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
  }
}

let waiting = 0;
const soon = () => {
  cancelAnimationFrame(waiting);
  waiting = requestAnimationFrame(name_and_reach);
};
new MutationObserver(soon).observe(document.body, { childList: true, subtree: true });
addEventListener("resize", soon);
soon();
