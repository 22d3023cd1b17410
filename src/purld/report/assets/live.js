"use strict";
// A page about a run that is still going: it says how old it is, and loads itself again.
(() => {
  const age = document.getElementById("age");
  if (!age) return;
  const every = 1000 * Number(age.dataset.every);
  if (!every) return;
  const written = 1000 * Number(age.dataset.written);
  const QUIET = Math.max(10 * every, 300_000); // without news for longer, the run may have stopped

  const inWords = (milliseconds) => {
    const seconds = Math.max(0, Math.round(milliseconds / 1000));
    return seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} min`;
  };

  function tell() {
    const old = Date.now() - written;
    age.textContent = `Written ${inWords(old)} ago; it loads itself again while the run goes on.`;
    if (old > QUIET) age.textContent = `Nothing new for ${inWords(old)}: this stage logs nothing, or the run has stopped.`;
    age.classList.toggle("quiet", old > QUIET);
  }

  // Nothing is taken away from a reader who searches or marks text.
  const isBusy = () => Boolean(document.querySelector("#browser input")?.value || String(getSelection()));

  tell();
  setInterval(tell, 1000);
  setInterval(() => isBusy() || location.reload(), every);
})();
