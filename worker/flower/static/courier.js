/* Keeps a page of ours up to date, unless its reader is about to confirm something. */
(function () {
    "use strict";

    var EVERY_MS = 5000,
        content = document.getElementById("courier-content"),
        updated = document.getElementById("courier-updated"),
        indicator = document.getElementById("courier-indicator");

    function isBusy() {
        return document.hidden || content.querySelector("details[open]") || content.contains(document.activeElement) ||
            String(window.getSelection());
    }

    function show(isLive, text) {
        indicator.classList.toggle("status-dot-live", isLive);
        indicator.classList.toggle("status-dot-error", !isLive);
        updated.textContent = text;
    }

    function refresh() {
        if (isBusy()) {
            return;
        }
        fetch(window.location.href, {credentials: "same-origin"}).then(function (answer) {
            return answer.text().then(function (text) {
                var page = new DOMParser().parseFromString(text, "text/html"),
                    fresh = page.getElementById("courier-content");
                if (!fresh) {
                    throw new Error(answer.statusText);
                }
                if (!isBusy()) {
                    content.replaceChildren.apply(content, Array.from(fresh.childNodes));
                    show(answer.ok, page.getElementById("courier-updated").textContent);
                }
            });
        }).catch(function () {
            show(false, "Update failed");
        });
    }

    window.setInterval(refresh, EVERY_MS);
}());
