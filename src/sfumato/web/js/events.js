// Server-sent events from a fetch: EventSource can send neither a body nor a key.
import { Failure, failureOf, parse } from "./api.js";
import { lost } from "./connection.js";

/** The `data:` of each event as an object. Raises Failure for an error. */
export async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await next(reader);
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.split("\n").filter((line) => line.startsWith("data:")).map((line) => line.slice(5));
        if (!data.length) continue; // a comment that keeps the connection open
        const event = parse(data.join("\n"));
        if (event.error) throw failureOf(event.error);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

async function next(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw new Failure("Stopped.", { code: "cancelled" });
    lost();
    throw new Failure("The connection to the server broke.", { code: "offline" });
  }
}
