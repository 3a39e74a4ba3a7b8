// What every test here needs: where the server is, the files to send, and what a PNG says of itself.
import { readFileSync } from 'node:fs';

export const baseURL = `${process.env.SFUMATO_URL}/v1`;
export const photo = readFileSync(process.env.SFUMATO_PHOTO);
export const mask = readFileSync(process.env.SFUMATO_MASK);

/** [width, height] of PNG bytes; throws when they are no PNG. */
export function sizeOf(bytes) {
  const data = Buffer.from(bytes);
  if (data.toString('latin1', 1, 4) !== 'PNG') throw new Error(`no PNG: ${data.subarray(0, 8).toString('hex')}`);
  return [data.readUInt32BE(16), data.readUInt32BE(20)];
}

export const sizeOfText = (base64) => sizeOf(Buffer.from(base64, 'base64'));
