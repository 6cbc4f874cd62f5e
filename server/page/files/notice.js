// What went wrong, said kindly, with what one can do.

const KIND = {
  401: "A key is needed",
  403: "This key may not do that",
  413: "That is too large",
  415: "That is no picture we can read",
  429: "The server is busy",
  503: "Not just now",
  504: "That took too long",
};

export class Notice {
  constructor(parts) {
    Object.assign(this, parts);
    this.close.addEventListener("click", () => this.hide());
  }

  hide() {
    clearInterval(this.timer);
    this.box.hidden = true;
  }

  /** Show a Trouble; `again` is what a retry would do. Whoever waits is counted down to it. */
  show(trouble, again) {
    const { problem = {} } = trouble;
    clearInterval(this.timer);
    this.title.textContent = KIND[trouble.status] || problem.title || "Something went wrong";
    const report = problem.instance ? ` (${problem.instance})` : "";
    this.text.textContent = `${sentence(trouble.message)}${report}`;
    this.act.hidden = !again;
    this.act.onclick = () => { this.hide(); again(); };
    this.box.hidden = false;
    this.wait(trouble.retryAfter);
    this.box.scrollIntoView({ block: "nearest" });
  }

  wait(seconds) {
    let left = Math.ceil(seconds);
    const tick = () => {
      this.act.textContent = left > 0 ? `Look again in ${left} s` : "Look again";
      this.act.disabled = left > 0;
      if (left-- <= 0) clearInterval(this.timer);
    };
    tick();
    if (left >= 0) this.timer = setInterval(tick, 1000);
  }
}

const sentence = (text) => (text ? text[0].toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".") : "");
