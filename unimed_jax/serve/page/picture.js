/** Reads a dropped file and has the server turn it into what the model sees. */

import { ServerError } from "./server.js";

/**
 * Reads a file as a data URL.
 * @param {File} file what a person chose
 * @param {number|undefined} most bytes that the server takes
 */
export async function read(file, most) {
  if (!file.size) throw new ServerError(`${file.name} is empty; choose another file.`);
  if (most && file.size > most) {
    throw new ServerError(
      `${file.name} has ${megabytes(file.size)} MB, and the server takes ${megabytes(most)} MB; choose a smaller file.`,
    );
  }
  const kind = kindOf(new Uint8Array(await file.slice(0, 132).arrayBuffer())) || file.type;
  const blob = new Blob([file], { type: kind || "application/octet-stream" });
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new ServerError(`${file.name} cannot be read; is it still there?`));
    reader.readAsDataURL(blob);
  });
}

/**
 * Returns the picture as the model sees it.
 *
 * original: the file's data URL, kept so that another window or frame can be asked for;
 * url: PNG; width, height: pixels; window: a preset's name, [centre, width] or null.
 */
export async function develop(server, original, name, { window = null, frame = null }, signal) {
  const body = { image: original };
  if (window !== null) body.window = window;
  if (frame !== null) body.frame = frame;
  const found = await server.post("v1/images", body, signal).catch((error) => {
    error.message = error.message.replace(/^'image'/, name); // the field's name says nothing to a person
    throw error;
  });
  return {
    original,
    name,
    window,
    url: found.image,
    width: found.width,
    height: found.height,
    frames: found.frames ?? 1,
    frame: found.frame ?? 0,
    windows: found.windows ?? [],
    kind: found.kind ?? "",
  };
}

const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

/** Returns the media type by a file's first bytes; a browser goes by the name alone. */
function kindOf(head) {
  const starts = (bytes, at = 0) => bytes.every((byte, i) => head[at + i] === byte);
  if (starts([0x89, 0x50, 0x4e, 0x47])) return "image/png";
  if (starts([0xff, 0xd8, 0xff])) return "image/jpeg";
  if (starts([0x49, 0x49, 0x2a, 0]) || starts([0x4d, 0x4d, 0, 0x2a])) return "image/tiff";
  if (starts([0x44, 0x49, 0x43, 0x4d], 128)) return "application/dicom";
  return "";
}
