// The warning before a session ends: docs/timeouts.md of django-clustered-sessions.
//
// What is known of the session says only when to ask. The server is asked before the warning comes,
// and again before anything is called over. To ask is no use of the session. Times are in seconds.
(() => {
  "use strict";

  const dialog = document.getElementById("session-expiry");
  if (!dialog || !dialog.showModal) return;

  const { expiryUrl, stayUrl, loginUrl, logoutUrl, csrfCookie, left: leftText } = dialog.dataset;
  const form = dialog.querySelector("form[method=post]");
  const trouble = dialog.querySelector(".session-expiry-trouble");
  const said = dialog.querySelector(".session-expiry-said");

  // When the time that is left is said to who cannot see it; how long until a request that failed is
  // repeated, and how long one may take; the longest between two looks at the clock; how old what is
  // known may be when a tab is looked at again.
  const SAY_AT = [60, 30, 10];
  const AGAIN = 5;
  const PATIENCE = 10;
  const LOOK = 15;
  const OLD = 60;

  // Does not jump when the computer's clock is set, but may stand still while it sleeps.
  const now = () => performance.now() / 1000;
  const apart = () => Date.now() / 1000 - now();

  let warnBefore = Number(dialog.dataset.warnBefore);
  let end = null; // when the session ends, by now(); null: not known yet
  let isDone = false; // nobody is logged in, or no more
  let isFinal = false; // staying gives no more time
  let isWarned = false;
  let isInDoubt = false;
  let wantsToStay = false;
  let isAsking = false;
  let shown = "";
  let answeredAt = now();
  let notBefore = 0;
  let unsaid = [];
  let clocks = apart();
  let timer;
  let channel;

  // What is known, and what follows from it.

  function learn(answer, age = 0) {
    answeredAt = now();
    isInDoubt = false;
    if (!answer.authenticated) {
      finish();
      return;
    }
    const before = end;
    end = now() + answer.expires_in - age;
    isFinal = answer.absolute_in !== null && answer.absolute_in - answer.expires_in < 1;
    let left = end - now();
    if (left <= warnBefore && !isFinal && before !== null && end - before > 1) {
      // Renewed, and still as short: it lasts no longer than the warning.
      warnBefore = left / 2;
    }
    if (left > warnBefore) {
      isWarned = false;
      hide();
    } else if (!isWarned || (shown === "warning" && isFinal)) {
      isWarned = true;
      show(isFinal ? "final" : "warning");
    }
    look();
  }

  function look() {
    clearTimeout(timer);
    if (isDone || isAsking) return;
    if (Math.abs(apart() - clocks) > 2) {
      // The computer has slept, or its clock was set.
      clocks = apart();
      isInDoubt = true;
    }
    const left = end - now();
    const isDue = isInDoubt || wantsToStay || left <= 0 || (left <= warnBefore && !isWarned);
    if (isDue && now() >= notBefore) {
      ask();
      return;
    }
    let wait = left - warnBefore;
    if (shown) {
      render(left);
      wait = left % 1 || 1;
    } else if (isWarned) {
      wait = left;
    } else if (document.hidden) {
      // The tab that is looked at asks for all.
      wait += 1 + Math.random();
    }
    if (isDue) wait = Math.min(shown ? 1 : Infinity, notBefore - now());
    timer = setTimeout(look, Math.min(Math.max(wait, 0.05), LOOK) * 1000);
  }

  async function ask() {
    const stays = wantsToStay;
    let answer = null;
    let again = AGAIN;
    let isRefused = false;
    isAsking = true;
    try {
      const response = await fetch(stays ? stayUrl : expiryUrl, {
        ...(stays ? { method: "POST", body: token() } : {}),
        cache: "no-store",
        headers: { Accept: "application/json" },
        signal: AbortSignal.timeout(PATIENCE * 1000),
      });
      if (response.ok) answer = await response.json();
      else again = Number(response.headers.get("Retry-After")) || AGAIN;
      isRefused = stays && response.status === 403;
    } catch {
      // No network, no answer in time, or none that is ours: it says nothing of the session.
    }
    isAsking = false;
    if (answer && typeof answer.authenticated === "boolean") {
      wantsToStay = false;
      complain("");
      tell(answer);
      learn(answer);
      return;
    }
    if (isRefused) wantsToStay = false;
    else notBefore = now() + again;
    complain(isRefused ? trouble.dataset.refused : trouble.dataset.away);
    look();
  }

  function token() {
    const body = new URLSearchParams(new FormData(form));
    // A login in another tab has changed it since this page was made.
    const cookie = document.cookie.split("; ").find((one) => one.startsWith(`${csrfCookie}=`));
    if (cookie) body.set("csrfmiddlewaretoken", cookie.slice(csrfCookie.length + 1));
    return body;
  }

  function finish() {
    clearTimeout(timer);
    isDone = true;
    if (end === null) return;
    if (logoutUrl) location.assign(logoutUrl);
    else show("over");
  }

  // The dialog.

  function show(state) {
    if (dialog.open) dialog.close();
    shown = state;
    for (const part of dialog.querySelectorAll("[data-when]")) part.hidden = part.dataset.when !== state;
    dialog.setAttribute("aria-labelledby", `session-expiry-${state}`);
    dialog.setAttribute("aria-describedby", `session-expiry-${state}-text`);
    complain("");
    said.textContent = "";
    if (!isDone) {
      const left = end - now();
      unsaid = SAY_AT.filter((at) => at < left - 1);
      for (const each of dialog.querySelectorAll(".session-expiry-words")) each.textContent = words(left);
      render(left);
    }
    dialog.showModal();
    const first = { warning: ".session-expiry-stay", over: ".session-expiry-login" }[state];
    dialog.querySelector(first || `[data-when="${state}"] .session-expiry-later`).focus();
  }

  function hide() {
    shown = "";
    if (dialog.open) dialog.close();
  }

  function render(left) {
    const seconds = Math.max(0, Math.ceil(left));
    const clock = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
    for (const each of dialog.querySelectorAll(".session-expiry-clock")) each.textContent = clock;
    if (left <= unsaid[0]) {
      while (left <= unsaid[0]) unsaid.shift();
      said.textContent = leftText.replace("{time}", words(left));
    }
  }

  function complain(text) {
    if (trouble.textContent !== text) trouble.textContent = text;
  }

  function words(left) {
    const seconds = Math.max(1, Math.round(left));
    const parts = [[Math.floor(seconds / 60), "minute"], [seconds % 60, "second"]];
    return parts.filter(([count]) => count).map(([count, unit]) => {
      const options = { style: "unit", unit, unitDisplay: "long" };
      try {
        return count.toLocaleString(document.documentElement.lang || undefined, options);
      } catch {
        return count.toLocaleString(undefined, options); // the page's lang is no language
      }
    }).join(" ");
  }

  dialog.addEventListener("close", () => {
    // By Escape or a button; hide() and show() have seen to it already.
    if (!dialog.open) shown = "";
  });
  for (const each of dialog.querySelectorAll(".session-expiry-later")) {
    each.addEventListener("click", () => dialog.close());
  }
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    wantsToStay = true;
    notBefore = 0;
    look();
  });
  for (const link of dialog.querySelectorAll(".session-expiry-login")) {
    const url = new URL(loginUrl, location.href);
    url.searchParams.set("next", location.pathname + location.search);
    link.href = url;
  }

  // Other tabs.

  function tell(answer) {
    channel?.postMessage({ answer, at: Date.now() });
  }

  function listen() {
    channel = new BroadcastChannel(`clustered-sessions ${expiryUrl}`);
    channel.onmessage = ({ data: { answer, at } }) => {
      if (isDone) return;
      if (answer.authenticated) {
        learn(answer, Math.max(0, (Date.now() - at) / 1000));
      } else {
        isInDoubt = true;
        look();
      }
    };
  }

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) return;
    isInDoubt ||= now() - answeredAt > OLD;
    look();
  });
  window.addEventListener("online", () => {
    notBefore = 0;
    look();
  });
  window.addEventListener("pagehide", () => {
    channel.close();
    channel = null;
  });
  window.addEventListener("pageshow", (event) => {
    if (!event.persisted) return;
    listen();
    isInDoubt = true;
    look();
  });

  // This page itself was a use, and says what its server knew, unless it comes out of a cache.

  listen();
  const [entry] = performance.getEntriesByType("navigation");
  const isFresh = entry && entry.type !== "back_forward" && entry.transferSize > entry.encodedBodySize;
  if (dialog.dataset.known && isFresh) {
    const known = JSON.parse(dialog.dataset.known);
    tell(known);
    if (known.authenticated) end = entry.responseStart / 1000 + known.expires_in;
    else isDone = true;
  }
  look();
})();
