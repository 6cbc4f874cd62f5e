// The numbers of an answer: NumPy files, base64, resizing.

export function bytesOf(base64) {
  const text = atob(base64), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

export const blobOf = (map) => new Blob([bytesOf(map.data)], { type: map.media_type });

/** {values: Float32Array, height, width, planes} of a .npy file of little-endian float32 or bool. */
export function readNpy(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const wide = bytes[6] > 1, start = (wide ? 12 : 10) + (wide ? view.getUint32(8, true) : view.getUint16(8, true));
  const head = new TextDecoder("latin1").decode(bytes.subarray(wide ? 12 : 10, start));
  const kind = /'descr':\s*'([^']+)'/.exec(head)[1];
  const [height, width, planes = 1] = /'shape':\s*\(([^)]*)\)/.exec(head)[1].split(",").filter((s) => s.trim()).map(Number);
  const body = bytes.slice(start);
  const values = kind === "<f4" ? new Float32Array(body.buffer) : Float32Array.from(body);
  return { values, height, width, planes };
}

/** Plane `plane` of a map at another size, bilinear. */
export function resized(map, plane, height, width) {
  const out = new Float32Array(height * width), { values, planes } = map;
  for (let y = 0; y < height; y++) {
    const sy = Math.min(Math.max(((y + 0.5) * map.height) / height - 0.5, 0), map.height - 1);
    const y0 = Math.floor(sy), fy = sy - y0, y1 = Math.min(y0 + 1, map.height - 1);
    for (let x = 0; x < width; x++) {
      const sx = Math.min(Math.max(((x + 0.5) * map.width) / width - 0.5, 0), map.width - 1);
      const x0 = Math.floor(sx), fx = sx - x0, x1 = Math.min(x0 + 1, map.width - 1);
      const at = (yy, xx) => values[(yy * map.width + xx) * planes + plane];
      const top = at(y0, x0) * (1 - fx) + at(y0, x1) * fx, low = at(y1, x0) * (1 - fx) + at(y1, x1) * fx;
      out[y * width + x] = top * (1 - fy) + low * fy;
    }
  }
  return out;
}

/** The value nearest to a place (0..1, 0..1), one number for each plane. */
export function valueAt(map, right, down) {
  const x = Math.min(map.width - 1, Math.floor(right * map.width)), y = Math.min(map.height - 1, Math.floor(down * map.height));
  return Array.from({ length: map.planes }, (_, plane) => map.values[(y * map.width + x) * map.planes + plane]);
}

export function peakOf(values) {
  let peak = 0;
  for (const value of values) if (value > peak) peak = value;
  return peak;
}
