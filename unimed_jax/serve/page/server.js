/** Talks to the server that gave this page, and to no other. */

/** Says in the server's own sentence what was refused. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

const BROKEN = "The connection ended before the answer was complete; ask again.";

/** Sends requests with the access token, which lies in this object alone. */
export class Server {
  token = "";

  /** Returns the JSON that lies at a path. */
  async get(path) {
    return this.#read(await this.#fetch(path, {}));
  }

  /** Posts JSON and returns the JSON that comes back. */
  async post(path, body, signal) {
    return this.#read(await this.#fetch(path, posted(body, signal)));
  }

  /** Posts JSON and yields the object of each server-sent event until [DONE]. */
  async *stream(path, body, signal) {
    const response = await this.#fetch(path, posted(body, signal));
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read().catch((error) => {
        throw error.name === "AbortError" ? error : new ServerError(BROKEN);
      });
      if (done) throw new ServerError(BROKEN);
      const events = (rest + value).split(/\r?\n\r?\n/);
      rest = events.pop();
      for (const event of events) {
        const data = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const text = data.map((line) => line.slice(5).trimStart()).join("\n");
        if (text === "[DONE]") return;
        if (!text) continue; // a comment that keeps the connection open
        const found = JSON.parse(text);
        if (found.error) throw new ServerError(capital(found.error.message));
        yield found;
      }
    }
  }

  async #fetch(path, options) {
    const headers = { ...options.headers };
    if (this.token) headers.Authorization = `Bearer ${this.token}`;
    let response;
    try {
      response = await fetch(path, { ...options, headers, cache: "no-store", redirect: "error" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server cannot be reached; check that it still runs, then try again.");
    }
    if (!response.ok) throw new ServerError(await sentence(response), response.status);
    return response;
  }

  async #read(response) {
    try {
      return await response.json();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError("The server's answer could not be read; try again.");
    }
  }
}

function posted(body, signal) {
  const headers = { "Content-Type": "application/json" };
  return { method: "POST", body: JSON.stringify(body), headers, signal };
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

async function sentence(response) {
  try {
    return capital((await response.json()).error.message);
  } catch {
    return `The server answered with status ${response.status}.`; // a proxy's page, say
  }
}
