// The search of this site runs in a Worker. A browser gives none to a page that is opened from a file: there the same
// script runs in a hidden frame. mkdocs.yml names this file in the place of one that would be fetched.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inside = frame.contentWindow;
      const waiting = [];
      let ready = false;
      this.postMessage = (data) => {
        if (ready) inside.dispatchEvent(new inside.MessageEvent("message", { data }));
        else waiting.push(data);
      };
      this.terminate = () => frame.remove();
      inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      inside.importScripts = (...urls) => Promise.all(urls.map(load));
      function load(src) {
        return new Promise((resolve, reject) => {
          const script = inside.document.createElement("script");
          script.onload = resolve;
          script.onerror = () => reject(new Error(`cannot load ${src}`));
          script.src = src;
          inside.document.head.append(script);
        });
      }
      load(String(url)).then(() => {
        ready = true;
        waiting.splice(0).forEach(this.postMessage);
      });
    }
  };
}
